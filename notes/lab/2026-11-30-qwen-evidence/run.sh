#!/bin/bash
# The paper's experiment on Qwen2.5-Coder-0.5B-Instruct over all visible GPUs, within a time limit; each call continues the one before. From the repository root.
#   OUT=FOLDER run.sh [--deadline SECONDS]   (default: $DEADLINE or 560); results in $OUT/evidence.tar.xz and $OUT/progress.txt
# Beside the steps of examples/paper it runs segments.py (as soon as the gates are trained) and trains PHATGOOSE's gates in four processes.
set -u
DEADLINE=${DEADLINE:-560}; [ "${1:-}" = --deadline ] && DEADLINE=$2
EXP=${EXP:-/tmp/exp} SIZES=${SIZES:-qwen} JOBS=${JOBS:-11} ROWS=${ROWS:-64} LAB=$PWD/notes/lab/2026-11-30-qwen-evidence
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
WORK=runs/paper-qwen; HERE=$(cd "$(dirname "$0")" && pwd)
left() { echo $((DEADLINE - SECONDS)); }
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true RAYON_NUM_THREADS=4 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TRITON_CACHE_DIR=$EXP/triton METEORA_CACHE=$EXP/cache
mkdir -p "$OUT" "$EXP/logs"; OUT=$(cd "$OUT" && pwd)
collect() {
    ( cd "$EXP" && find $WORK/steps $WORK/logs $WORK/segments.json $WORK/meteora.toml docs logs $WORK/eval \( -name '.*' -prune \) -o -type f ! -name '*.part*' ! -name '*.safetensors' -print 2>/dev/null
      find $WORK/gates $WORK/adapters -name '*.json' -not -path '*/.*' 2>/dev/null ) | tar -C "$EXP" -cf - -T - 2>/dev/null | if command -v xz > /dev/null; then xz -3 -T8 > "$OUT/evidence.tar.xz"; else gzip -6 > "$OUT/evidence.tar.gz"; fi
    { ls -l "$OUT"; ls "$WORK/steps"; } > "$OUT/progress.txt" 2>&1
}
bash "$HERE/prepare.sh" || exit 3
cd "$EXP" || exit 3
echo "prepared: $SECONDS s"
rm -f "$EXP/engine-ended"
gpus=($(echo "${CUDA_VISIBLE_DEVICES-}" | tr , " ")); [ ${#gpus[@]} -gt 0 ] || gpus=("")
waited() { while [ "$(left)" -gt 25 ] && [ ! -f "$EXP/engine-ended" ]; do for name in "$@"; do [ -f "$WORK/steps/$name.json" ] || { sleep 1; continue 2; }; done; return 0; done; return 1; }
side() {  # GPU needs... -- command: in the background once the needed steps are done, until 20 s before the end
    local gpu=$1 needs=(); shift
    while [ "$1" != -- ]; do needs+=("$1"); shift; done; shift
    ( waited "${needs[@]}" || exit; [ -n "$gpu" ] && export CUDA_VISIBLE_DEVICES=$gpu; [ "$(left)" -gt 40 ] && exec timeout -s INT -k 5 $(( $(left) - 20 )) "$@" ) &
}
side "${gpus[0]}" gates-ridge -- python3 $LAB/segments.py "$WORK/gates/ridge" --data "$WORK/datasets" --adapters "$WORK/adapters" --base qwen2.5-coder-0.5b --out "$WORK/segments.json" --rows "$ROWS" ${SEGMENTS:-} > "$EXP/logs/segments.log" 2>&1
for share in 0 1 2 3; do
    gpu=${gpus[$(( share % ${#gpus[@]} ))]}
    side "$gpu" gates-ridge gates-composites gates-closed -- python3 $LAB/phatgoose_gates.py $share 4 --config "$WORK/meteora.toml" --out "$WORK/eval/routers" > "$EXP/logs/phatgoose-$share.log" 2>&1
done
python3 -m examples.paper "$SIZES" --raw-dir raw --docs docs ${DEVICE:+--device $DEVICE} --jobs "$JOBS" --keep-going --for $(( $(left) - 62 )) ${ONLY:-} 2>&1 | tee -a "$EXP/logs/engine.log"
touch "$EXP/engine-ended"
echo "engine ended at $SECONDS s"
timeout $(( $(left) - 18 )) python3 -m examples.paper "$SIZES" --raw-dir raw --docs docs ${DEVICE:+--device $DEVICE} --keep-going --report > "$EXP/logs/report.log" 2>&1
while [ "$(left)" -gt 24 ] && [ -n "$(jobs -rp)" ]; do sleep 0.5; done
collect
kill $(jobs -rp) 2>/dev/null
echo "collected at $SECONDS s: $(ls -l "$OUT" | tr '\n' ' ')"
for log in "$EXP"/logs/segments.log; do echo "--- $log"; cat "$log"; done
echo "--- steps done: $(cd "$WORK/steps" && ls *.json | grep -v parts | sed 's/.json//' | tr '\n' ' ')"
