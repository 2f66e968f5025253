# The order of a run on Qwen2.5-Coder-0.5B, for run.sh of 2026-11-30-qwen-evidence, from the repository root:
#   . notes/lab/2026-12-01-switching-tasks/order.sh; OUT=FOLDER bash notes/lab/2026-11-30-qwen-evidence/run.sh --deadline SECONDS
# One group for what is most worth, so that no step waits for the end of others; then Arrow and composite rows with the adapters; then second seeds.
# Three gates train at the same time, which takes about 90 GB; nothing else that trains should use the same GPU.
export SIZES=${SIZES:-qwen-lists} WORK=${WORK:-runs/paper-qwen-lists} FIRST_JOBS=${FIRST_JOBS:-14} JOBS=${JOBS:-10}
export FIRST="adapters-* lora-b gates-ridge gates-composites-fixed gates-joined gates-closed eval-own eval-ridge eval-lora-b eval-composites-fixed eval-joined eval-closed eval-ridge-T1 eval-ridge-top1 routers-choosing routers-meteora routers-prompt routers-spectr routers-closed-form routers-meteora-without routers-prompt-without routers-spectr-without routers-closed-form-without"
export SECOND="gates-composites eval-composites routers-arrow routers-arrow-without routers-phatgoose routers-phatgoose-without/gates-ridge-seed2 eval-ridge-seed2 routers-*-seed2 eval-composites-T1"
export SEGMENTS_AFTER="gates-ridge" SEGMENTS="--composites 3,5,10 --ways oracle,oracle-given,alone,gates-given --batch 16"
export PARTS="ridge joined composites-fixed" PHATGOOSE=1 PHATGOOSE_AFTER="gates-ridge gates-joined gates-composites-fixed eval-ridge eval-joined"
