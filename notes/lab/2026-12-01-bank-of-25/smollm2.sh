#!/bin/bash
# A bank of 25 adapters of SmolLM2-135M on a machine without a network: converts the base, trains the adapters with list rows, and measures.
#   FROM=FOLDER smollm2.sh carry               keeps what is in $FROM of the parts of the GGUF file (smollm2-part-*) and of general text (general.jsonl, by
#                                              texts.py); converts in the background as soon as all parts are there
#   OUT=FOLDER smollm2.sh [--deadline SECONDS] [options of bank.sh and bank.py]    trains (continues), then bank.sh once all adapters are trained
# Datasets are in $EXP/data, further packages in $EXP/site (default of $EXP: /tmp/exp).
set -u
EXP=${EXP:-/tmp/exp} SIZE=98362432 STEPS=${STEPS:-72} LENGTH=${LENGTH:-768} COUNT=${COUNT:-25}
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../../.." && pwd)
export METEORA_CACHE=$EXP/cache PYTHONPATH=$EXP/site:$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True WAYS=${WAYS-} RIDGE_TOKENS=${RIDGE_TOKENS:-100000}
WORK=$EXP/smollm2 BASE=${BASE:-$METEORA_CACHE/models/smollm2-135m}; mkdir -p "$WORK/gguf" "$WORK/logs" "$METEORA_CACHE/models"
if [ "${1:-}" = carry ]; then
    for file in "$FROM"/smollm2-part-*; do [ -f "$file" ] && cp "$file" "$WORK/gguf/"; done
    [ -f "$FROM/general.jsonl" ] && cp "$FROM/general.jsonl" "$WORK/"
    have=$(cat "$WORK"/gguf/smollm2-part-* | wc -c)
    echo "SmolLM2: $have of $SIZE bytes"
    [ "$have" = $SIZE ] && [ ! -f "$WORK/logs/convert.log" ] && cat "$WORK"/gguf/smollm2-part-* > "$WORK/gguf/SmolLM2-135M-Instruct.Q4_1.gguf" && OMP_NUM_THREADS=8 setsid python3 -c "
from pathlib import Path
from meteora_core.fetch.base_models import catalog_entry, convert_gguf
entry = catalog_entry('smollm2-135m')
convert_gguf(entry, Path('$WORK/gguf') / entry.gguf, Path('$BASE'))" > "$WORK/logs/convert.log" 2>&1 < /dev/null &
    exit 0
fi
DEADLINE=300; [ "${1:-}" = --deadline ] && DEADLINE=$2 && shift 2
left() { echo $((DEADLINE - SECONDS)); }
while [ ! -f "$BASE/meteora_source.json" ]; do [ "$(left)" -gt 60 ] || { cat "$WORK/logs/convert.log"; echo "the base is not converted"; exit 3; }; sleep 1; done
[ "$(ls "$EXP/data" | wc -l)" -ge 25 ] || { echo "the datasets are missing"; exit 3; }
cat > "$WORK/meteora.toml" <<'TOML'
[train_adapters]
max_length = LENGTH
list_rows = 0.25
list_max = 10
together_rows = 28
learning_rate = 1e-3
loss_on = "response"
dropout = 0.0
save_steps = 12
gradient_checkpointing = CHECKPOINTING
TOML
sed -i "s/= LENGTH/= $LENGTH/; s/= CHECKPOINTING/= ${CHECKPOINTING:-true}/" "$WORK/meteora.toml"
tasks=($(ls "$EXP/data" | grep -v composite | head -n "$COUNT"))
gpus=($(echo "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | tr '\n' ' ')}" | tr , " ")); [ ${#gpus[@]} -gt 0 ] || gpus=("")
for part in 0 1 2 3; do
    mine=(); for index in "${!tasks[@]}"; do [ $((index % 4)) = $part ] && [ ! -f "$WORK/adapters/${tasks[index]}/adapter_config.json" ] && mine+=("${tasks[index]}"); done
    [ ${#mine[@]} = 0 ] && continue
    ( gpu=${gpus[$((part % ${#gpus[@]}))]}; [ -n "$gpu" ] && export CUDA_VISIBLE_DEVICES=$gpu; export OMP_NUM_THREADS=${THREADS:-3}
      exec timeout -s INT -k 5 $(( $(left) - 25 )) python3 -m meteora_cli --config "$WORK/meteora.toml" train adapters --base "$BASE" --data "$EXP/data" --adapters "$WORK/adapters" --task "$(IFS=,; echo "${mine[*]}")" --together --rank 8 --max-steps "$STEPS" --batch-size 8 --resume ) > "$WORK/logs/train-$part.log" 2>&1 &
done
wait
echo "$(ls "$WORK"/adapters/*/adapter_config.json | wc -l) adapters after $SECONDS s"
for part in 0 1 2 3; do tail -c 300 "$WORK/logs/train-$part.log" | tr '\r' '\n' | tail -2; done
[ "$(ls "$WORK"/adapters/*/adapter_config.json | wc -l)" = ${#tasks[@]} ] || { echo "not all adapters are trained; the next call continues"; exit 0; }
[ "$(left)" -gt 60 ] || exit 0
[ -f "$WORK/general.jsonl" ] && general="--general $WORK/general.jsonl" || general=
exec bash "$HERE/bank.sh" "$BASE" "$WORK/adapters" "$EXP/data" "$WORK/bank" --deadline $(( $(left) - 20 )) "$@" $general
