# The order of the run on Qwen2.5-Coder-0.5B, for run.sh of 2026-11-30-qwen-evidence, from the repository root:
#   . notes/lab/2026-12-01-switching-tasks/order.sh; OUT=FOLDER bash notes/lab/2026-11-30-qwen-evidence/run.sh --deadline SECONDS
# Trainings first, with what needs the adapters alone beside them; then evaluations, in the order of steps.toml; then what may be missing.
export SIZES=${SIZES:-qwen-lists} WORK=${WORK:-runs/paper-qwen-lists} FIRST_JOBS=${FIRST_JOBS:-24} JOBS=${JOBS:-12}
export FIRST="adapters-* gates-ridge gates-closed gates-composites-fixed gates-joined gates-composites eval-own routers-choosing routers-arrow routers-arrow-without"
export SECOND="eval-ridge eval-composites-fixed eval-joined eval-closed eval-composites eval-ridge-T1 eval-ridge-top1 routers-prompt routers-spectr routers-closed-form routers-phatgoose routers-meteora routers-*-without"
SECOND="$SECOND/gates-ridge-seed2 eval-ridge-seed2 routers-*-seed2 eval-composites-T1"
export SEGMENTS_AFTER="gates-ridge" SEGMENTS="--composites 3,5,10 --ways oracle,oracle-given,alone,gates-given"
export PARTS="ridge joined composites-fixed" PHATGOOSE=1 PHATGOOSE_AFTER="gates-ridge gates-joined gates-composites-fixed gates-composites"
