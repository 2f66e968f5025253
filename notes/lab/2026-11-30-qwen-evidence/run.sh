#!/bin/bash
# The paper's experiment on Qwen2.5-Coder-0.5B-Instruct over all visible GPUs, within a time limit; each call continues the one before. From the repository root.
#   OUT=FOLDER run.sh [--deadline SECONDS]   (default: $DEADLINE or 560); results in $OUT/evidence.tar.xz (written anew every 60 s) and $OUT/progress.txt
# Beside the steps of examples/paper it runs segments.py once MeteoRA and LoRA-B are scored and, with PHATGOOSE=1, trains PHATGOOSE's gates in four processes.
# BESIDE="COMMAND" runs one more command from the repository root on the last GPU, once the steps of BESIDE_AFTER are done (default: the adapters).
# The steps of FIRST run first (default: what the main table needs), so that nothing else slows them; then those of SECOND (default: all others), unless FIRST_ALONE=1.
# FIRST_JOBS and JOBS are the places of FIRST and of the others. Each may name several groups, separated by /, each of which starts once the one before has ended; "8:gates-*" is a group
# with 8 places. ALONG names groups that run beside FIRST and SECOND, once the steps of ALONG_AFTER are done. SIZES and WORK name the sizes file and its folder.
# MPS=1: the processes share the GPU through NVIDIA's MPS if it can be started, so that their kernels overlap.
# segments.py starts once the steps of SEGMENTS_AFTER are done. PARTS="ridge joined" runs parts.py of 2026-12-01-switching-tasks on these gates, once they are trained.
set -u
DEADLINE=${DEADLINE:-560}; [ "${1:-}" = --deadline ] && DEADLINE=$2
export EXP=${EXP:-/tmp/exp}
SIZES=${SIZES:-qwen} JOBS=${JOBS:-8} FIRST_JOBS=${FIRST_JOBS:-${JOBS:-8}} ROWS=${ROWS:-32} REPO=$PWD HERE=$(cd "$(dirname "$0")" && pwd) BASE=${BASE:-qwen2.5-coder-0.5b}
LAB=$HERE WORK=${WORK:-runs/paper-qwen}
left() { echo $((DEADLINE - SECONDS)); }
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true RAYON_NUM_THREADS=4 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TRITON_CACHE_DIR=$EXP/triton METEORA_CACHE=${METEORA_CACHE:-$EXP/cache}
mkdir -p "$OUT" "$EXP/logs"; export OUT=$(cd "$OUT" && pwd)
collect() {
    ( cd "$EXP" && find $WORK/steps $WORK/logs $WORK/segments.json $WORK/parts.json $WORK/meteora.toml docs logs $WORK/eval \( -name '.*' -prune \) -o -type f ! -name '*.part*' ! -name '*.safetensors' -print 2>/dev/null
      find $WORK/gates $WORK/adapters -name '*.json' -not -path '*/.*' 2>/dev/null ) > "$EXP/.list"
    if command -v xz > /dev/null; then tar -C "$EXP" -cf - -T "$EXP/.list" 2>/dev/null | xz -3 -T8 > "$EXP/.evidence" && mv "$EXP/.evidence" "$OUT/evidence.tar.xz"
    else tar -C "$EXP" -czf "$EXP/.evidence" -T "$EXP/.list" 2>/dev/null; mv "$EXP/.evidence" "$OUT/evidence.tar.gz"; fi
    { ls -l "$OUT"; ls "$EXP/$WORK/steps"; } > "$OUT/progress.txt" 2>&1
}
[ -n "${PREPARED:-}" ] || WORK=$WORK bash "$HERE/prepare.sh" || exit 3
export PYTHONPATH=$LAB:$EXP/site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
cd "$EXP" || exit 3
if [ -n "${MPS:-}" ] && [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
    control=$(command -v nvidia-cuda-mps-control || ls /usr/local/nvidia/bin/nvidia-cuda-mps-control /usr/bin/nvidia-cuda-mps-control 2>/dev/null | head -1)
    export CUDA_MPS_PIPE_DIRECTORY=$EXP/mps CUDA_MPS_LOG_DIRECTORY=$EXP/mps-log
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    if [ -n "$control" ] && setsid "$control" -d 9>&- && timeout 40 python3 -c "import torch; print('MPS works:', torch.ones(8, 8, device='cuda').sum().item())"; then
        trap 'echo quit | timeout 10 "$control" > /dev/null 2>&1' EXIT
    else
        echo "MPS does not work here: ${control:-no nvidia-cuda-mps-control}"; tail -3 "$CUDA_MPS_LOG_DIRECTORY"/*.log 2>/dev/null
        [ -z "$control" ] || echo quit | timeout 10 "$control" > /dev/null 2>&1
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi
echo "prepared: $SECONDS s"
rm -f "$EXP/engine-ended" "$EXP/first-ended"
gpus=($(echo "${CUDA_VISIBLE_DEVICES-}" | tr , " ")); count=$(nvidia-smi -L 2>/dev/null | wc -l)
[ ${#gpus[@]} -gt 0 ] || [ "$count" -eq 0 ] || gpus=($(seq 0 $((count - 1))))
[ ${#gpus[@]} -gt 0 ] || gpus=("")
waited() { while [ "$(left)" -gt 25 ] && [ ! -f "$EXP/engine-ended" ]; do [ ! -f "$EXP/first-ended" ] || return 0; for name in "$@"; do [ -f "$WORK/steps/$name.json" ] || { sleep 1; continue 2; }; done; return 0; done; return 1; }
sides=()
side() {  # GPU needs... -- command: in the background once the needed steps are done, or all of FIRST that can be done, until 20 s before the end
    local gpu=$1 needs=(); shift
    while [ "$1" != -- ]; do needs+=("$1"); shift; done; shift
    ( waited "${needs[@]}" || exit; [ -n "$gpu" ] && export CUDA_VISIBLE_DEVICES=$gpu; [ "$(left)" -gt 40 ] && exec timeout -s INT -k 5 $(( $(left) - 20 )) "$@" ) &
    sides+=($!)
}
side "${gpus[0]}" ${SEGMENTS_AFTER:-eval-ridge eval-lora-b} -- python3 $LAB/segments.py "$WORK/gates/ridge" --data "$WORK/datasets" --adapters "$WORK/adapters" --base "$BASE" --out "$WORK/segments.json" --rows "$ROWS" ${SEGMENTS:-} > "$EXP/logs/segments.log" 2>&1
[ -z "${PARTS:-}" ] || side "${gpus[0]}" $(printf 'gates-%s ' $PARTS) -- python3 $LAB/../2026-12-01-switching-tasks/parts.py $(printf "$WORK/gates/%s " $PARTS) --data "$WORK/datasets" --adapters "$WORK/adapters" --base "$BASE" --out "$WORK/parts.json" --rows "$ROWS" ${PARTS_OPTIONS:-} > "$EXP/logs/parts.log" 2>&1
[ -z "${PHATGOOSE:-}" ] || for share in 0 1 2 3; do
    gpu=${gpus[$(( share % ${#gpus[@]} ))]}
    side "$gpu" ${PHATGOOSE_AFTER:-gates-composites gates-ridge} -- python3 $LAB/phatgoose_gates.py $share 4 --config "$WORK/meteora.toml" --out "$WORK/eval/routers" > "$EXP/logs/phatgoose-$share.log" 2>&1
done
[ -z "${BESIDE:-}" ] || side "${gpus[-1]}" ${BESIDE_AFTER:-adapters-1 adapters-2 adapters-3 adapters-4} -- bash -c "cd '$REPO' && $BESIDE" > "$EXP/logs/beside.log" 2>&1
( while [ "$(left)" -gt 90 ]; do sleep 60; [ "$(left)" -gt 60 ] && collect; done ) & saving=$!
engine() { [ "$(left)" -lt 90 ] || python3 -m examples.paper "$SIZES" --raw-dir raw --docs docs ${DEVICE:+--device $DEVICE} --jobs "${jobs:-$JOBS}" --keep-going --for $(( $(left) - 40 )) "$@" 2>&1 | tee -a "$EXP/logs/engine.log" | stdbuf -oL cut -c1-200; }
groups() {  # default places, groups: one after another
    local group jobs each; IFS=/ read -r -a each <<< "$2"
    for group in "${each[@]:-}"; do
        jobs=$1
        [[ $group =~ ^\ *([0-9]+):(.*)$ ]] && jobs=${BASH_REMATCH[1]} group=${BASH_REMATCH[2]}
        engine ${group:+--only $group}
    done
}
set -f  # the * in the names of steps are examples.paper's
along=
have() { local name; for name in "$@"; do [ -f "$WORK/steps/$name.json" ] || return 1; done; }
[ -z "${ALONG:-}" ] || { ( until have $ALONG_AFTER || [ -f "$EXP/first-ended" ]; do sleep 1; done; groups "$JOBS" "$ALONG" ) & along=$!; }
groups "$FIRST_JOBS" "${FIRST:-datasets loras gates-ridge gates-closed gates-composites eval-own eval-ridge eval-closed eval-lora-b eval-composites eval-base}"
touch "$EXP/first-ended"
[ -n "${FIRST_ALONE:-}" ] || groups "$JOBS" "${SECOND:-}"
[ -z "$along" ] || { wait "$along"; groups "$JOBS" "$ALONG"; }  # once more, for what could not start or failed
set +f
touch "$EXP/engine-ended"
echo "engine ended at $SECONDS s"
timeout $(( $(left) - 12 )) python3 -m examples.paper "$SIZES" --raw-dir raw --docs docs ${DEVICE:+--device $DEVICE} --keep-going --report > "$EXP/logs/report.log" 2>&1 || tail -3 "$EXP/logs/report.log"
kill $saving 2>/dev/null
while [ "$(left)" -gt 24 ]; do
    busy=; for pid in "${sides[@]}"; do kill -0 "$pid" 2>/dev/null && busy=1; done
    [ -n "$busy" ] || break; sleep 0.5
done
collect
kill "${sides[@]}" 2>/dev/null
sed -n '/^## Overview/,/^## The paper/p' docs/paper.md 2>/dev/null
grep -E '\*\*(holds|fails|partly|undecided)\*\*' docs/paper.md 2>/dev/null | cut -c1-600
echo "--- segments"; tail -12 "$EXP/logs/segments.log"
[ -z "${PARTS:-}" ] || { echo "--- parts"; tail -12 "$EXP/logs/parts.log"; }
[ -z "${BESIDE:-}" ] || { echo "--- beside"; tail -25 "$EXP/logs/beside.log"; }
echo "--- steps done: $(cd "$WORK/steps" && ls *.json | grep -v parts | sed 's/.json//' | tr '\n' ' ')"
echo "collected at $SECONDS s: $(ls -l "$OUT" | tr '\n' ' ')"
