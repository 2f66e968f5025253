# The order of a run on Qwen2.5-Coder-0.5B with all that the results page needs, for run.sh of 2026-11-30-qwen-evidence (see call.sh there):
#   OUT=FOLDER call.sh WAIT notes/lab/2026-12-01-evidence/order.sh --deadline SECONDS
# Adapters alone first, because gates wait for them; then LoRA-B and gates together; then the evaluations of the main table (beside trainings, decoding took ten times as long).
# Routers, T = 1, top-1 and second seeds run beside the evaluations once the gates are trained. What failed is tried again at the end.
trained="lora-b gates-ridge gates-composites-fixed gates-joined gates-closed"
main="eval-ridge eval-composites-fixed eval-joined eval-own eval-lora-b eval-closed routers-choosing"
export SIZES=${SIZES:-qwen-lists} WORK=${WORK:-runs/paper-qwen-lists} MPS=${MPS-1} FIRST_JOBS=${FIRST_JOBS:-16} JOBS=${JOBS:-9}
export FIRST="8:adapters-*/$trained/$main" SECOND="adapters-* $trained $main"
export ALONG_AFTER="lora-b gates-ridge gates-joined gates-composites-fixed"
export ALONG="routers-meteora routers-prompt routers-spectr routers-arrow routers-closed-form routers-meteora-without routers-prompt-without routers-spectr-without routers-arrow-without routers-closed-form-without/eval-ridge-T1 eval-joined-T1 eval-composites-fixed-T1 eval-ridge-top1 routers-phatgoose routers-phatgoose-without gates-ridge-seed2 eval-ridge-seed2 routers-meteora-seed2 routers-meteora-without-seed2 routers-prompt-seed2 routers-prompt-without-seed2 routers-arrow-seed2 routers-arrow-without-seed2"
export PHATGOOSE=1 PHATGOOSE_AFTER="eval-ridge eval-composites-fixed eval-joined eval-own eval-lora-b"
export PARTS="ridge joined composites-fixed" SEGMENTS_AFTER="eval-ridge eval-joined eval-composites-fixed eval-lora-b" SEGMENTS="--composites 3,5 --ways oracle,alone --batch 32"
