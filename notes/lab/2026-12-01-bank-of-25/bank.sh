#!/bin/bash
# Measures a bank of adapters (bank.py) on all visible GPUs within a time limit; a later call continues.
#   OUT=FOLDER bank.sh BASE ADAPTERS DATA WORK [--deadline SECONDS] [--workers N] [options of bank.py]
# BASE: model folder; ADAPTERS: folder of PEFT folders; DATA: folder of built datasets; WORK: folder of intermediate results; $OUT gets bank.tar.gz.
set -u
BASE=$1 ADAPTERS=$2 DATA=$3 WORK=$4; shift 4
DEADLINE=${DEADLINE:-150}; [ "${1:-}" = --deadline ] && DEADLINE=$2 && shift 2
WORKERS=${WORKERS:-6}; [ "${1:-}" = --workers ] && WORKERS=$2 && shift 2
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
start "${gpus[-1]}" 6 bank.py live "$BASE" "$ADAPTERS" "$DATA" "$WORK" --deadline "$DEADLINE" "$@"
for worker in $(seq "$WORKERS"); do
    start "${gpus[$(( worker % ${#gpus[@]} ))]}" 2 bank.py work "$BASE" "$ADAPTERS" "$DATA" "$WORK" --deadline "$DEADLINE" "$@"
done
[ -z "$WAYS" ] || [ -f "$WORK/results/ways.json" ] || start "${gpus[-1]}" 2 ${WAYS%% *} "$BASE" "$ADAPTERS" "$DATA" "$WORK/results/ways.json" ${WAYS#* } --deadline "$DEADLINE"
wait
python3 "$HERE/bank.py" report "$BASE" "$ADAPTERS" "$DATA" "$WORK" "$@" | tee "$WORK/report.txt"
tar -C "$WORK" -czf "$OUT/bank.tar.gz" results log.txt report.txt
grep -v "score\." "$WORK/log.txt" | grep -i "^ *[0-9.]* \[\|error" | tail -60
echo "$(ls "$WORK/results" | wc -l) parts in $(( $(date +%s) - BEGAN )) s: $(ls -l "$OUT/bank.tar.gz")"
