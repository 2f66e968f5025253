#!/bin/bash
# Measures a bank of adapters (bank.py) on all visible GPUs within a time limit; a later call continues.
# Then, in further calls of each worker, WRITTEN, the parts about ten adapters without rows, and ADDED, adapters added one by one (each empty for none).
# Beside it, `train gates --init ridge --max-steps 0` over the same adapters, and its scores (CLOSED= leaves this out), and ways.py (WAYS= leaves it out).
#   OUT=FOLDER bank.sh BASE ADAPTERS DATA WORK [--deadline SECONDS] [--workers N] [options of bank.py]
# BASE: model folder; ADAPTERS: folder of PEFT folders; DATA: folder of built datasets; WORK: folder of intermediate results; $OUT gets bank.tar.gz.
set -u
BASE=$1 ADAPTERS=$2 DATA=$3 WORK=$4; shift 4
DEADLINE=${DEADLINE:-150}; [ "${1:-}" = --deadline ] && DEADLINE=$2 && shift 2
WORKERS=${WORKERS:-6} WRITTEN=${WRITTEN-routing,ten,self,few4,named,example4,neutral} ADDED=${ADDED-added}; [ "${1:-}" = --workers ] && WORKERS=$2 && shift 2
WAYS=${WAYS-../2026-12-01-routed-rows/ways.py --held 24}  # closed-form gates from rows that run in several ways; empty for none
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../../.." && pwd)
BEGAN=$(date +%s); export BEGAN
export PYTHONPATH=$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true RAYON_NUM_THREADS=3
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton}
python3 - <<'CHECK' || exit 2
import importlib
missing = []
for name in ("torch", "transformers", "peft", "safetensors", "pydantic", "pydantic_settings", "sacrebleu", "rouge", "meteora_core", "meteora_kernels"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name} ({error})")
if missing:
    raise SystemExit("missing on this machine: " + ", ".join(missing))
CHECK
for folder in "$BASE" "$ADAPTERS" "$DATA"; do [ -d "$folder" ] || { echo "no folder $folder"; exit 3; }; done
echo "$(ls -d "$ADAPTERS"/*/ | wc -l) adapters, $(ls "$DATA" | wc -l) datasets"
mkdir -p "$WORK" "$OUT"
rm -rf "$WORK/claims" "$WORK/new"  # of processes that were stopped
gpus=($(echo "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | tr '\n' ' ')}" | tr , " ")); [ ${#gpus[@]} -gt 0 ] || gpus=("")
start() {  # GPU, threads, script, arguments
    ( [ -n "$1" ] && export CUDA_VISIBLE_DEVICES=$1; export OMP_NUM_THREADS=$2; script=$3; shift 3
      exec timeout -s INT -k 5 $((DEADLINE + 10 + BEGAN - $(date +%s))) python3 "$HERE/$script" "$@" ) >> "$WORK/log.txt" 2>&1 &
}
[ -z "$ADDED" ] || start "${gpus[-1]}" 6 bank.py live "$BASE" "$ADAPTERS" "$DATA" "$WORK" --deadline "$DEADLINE" "$@" --parts added
for worker in $(seq "$WORKERS"); do
    ( [ -n "${gpus[0]}" ] && export CUDA_VISIBLE_DEVICES=${gpus[$(( worker % ${#gpus[@]} ))]}; export OMP_NUM_THREADS=${THREADS:-2}
      for parts in "" $WRITTEN $ADDED; do
          limit=$((DEADLINE + 10 + BEGAN - $(date +%s))); [ $limit -gt 30 ] || exit
          timeout -s INT -k 5 $limit python3 "$HERE/bank.py" work "$BASE" "$ADAPTERS" "$DATA" "$WORK" --deadline "$DEADLINE" "$@" ${parts:+--parts $parts}
      done ) >> "$WORK/log.txt" 2>&1 &
done
closed() {  # the closed form of `train gates`, with as many tokens of each adapter as bank.py reads, and its scores
    local names=$(for name in $(ls "$ADAPTERS"); do [ -f "$DATA/$name/train.jsonl" ] && echo "$name"; done | head -n "${MOST:-25}" | paste -sd,)
    printf '[train_gates]\nmax_length = 512\nridge_tokens = %s\n' "${RIDGE_TOKENS:-200000}" > "$WORK/closed.toml"
    meteora() { python3 -m meteora_cli --config "$WORK/closed.toml" "$@" --task "$names" --data "$DATA"; }
    [ -f "$WORK/closed/meteora_config.json" ] || meteora train gates --base "$BASE" --adapters "$ADAPTERS" --out "$WORK/closed" --init ridge --max-steps 0 --answer-share 0.8 --batch-size 40 &&
        meteora eval --checkpoint "$WORK/closed" --top-k 2 --limit "${CLOSED_ROWS:-32}" --out "$WORK/eval" ${CLOSED_EVAL:-}
    echo "[closed] ended after $(( $(date +%s) - BEGAN )) s"
}
if [ -n "${CLOSED-1}" ]; then
    ( [ -n "${gpus[-1]}" ] && export CUDA_VISIBLE_DEVICES=${gpus[-1]}; export OMP_NUM_THREADS=2; export -f closed; export ADAPTERS DATA WORK BASE
      exec timeout -s INT -k 5 $((DEADLINE + 10 + BEGAN - $(date +%s))) bash -c closed ) >> "$WORK/closed.txt" 2>&1 &
fi
[ -z "$WAYS" ] || [ -f "$WORK/results/ways.json" ] || start "${gpus[-1]}" 2 ${WAYS%% *} "$BASE" "$ADAPTERS" "$DATA" "$WORK/results/ways.json" ${WAYS#* } --deadline "$DEADLINE"
wait
python3 "$HERE/bank.py" report "$BASE" "$ADAPTERS" "$DATA" "$WORK" "$@" --known "closed=$WORK/eval/meteora" > "$WORK/report.txt" 2>&1
tar -C "$WORK" -czf "$OUT/bank.tar.gz" results $(cd "$WORK" && ls log.txt report.txt closed.txt closed/meteora_config.json eval/meteora/results_*.json 2> /dev/null)
[ -f "$WORK/closed.txt" ] && tail -c 2000 "$WORK/closed.txt" | tr '\r' '\n' | tail -12 | cut -c1-200
grep -v "score\." "$WORK/log.txt" | grep -i "^ *[0-9.]* \[\|error" | grep -v "_pytree" | cut -c1-240 | tail -36
cat "$WORK/report.txt"
echo "$(ls "$WORK/results" | wc -l) parts in $(( $(date +%s) - BEGAN )) s: $(ls -l "$OUT/bank.tar.gz")"
