#!/bin/bash
# A bank of 25 adapters of SmolLM2-135M on a machine with a GPU: trains the adapters as the paper's experiment does, routes them with `meteora route`, and measures.
#   OUT=FOLDER run.sh [--deadline SECONDS]     continues where the last call ended; $OUT gets bank.tar.gz, anew after every step: results, logs and, at the end, a report
#   run.sh start SECONDS                       the same in a process session of its own, with a copy of the code
#   OUT=FOLDER run.sh wait SECONDS             waits for it, at most so long, and copies what there is into $OUT
# Before, `FROM=FOLDER ../2026-12-01-bank-of-25/smollm2.sh carry` brings the base and general text. Datasets are in $EXP/data, further packages in $EXP/site.
# Tracks run side by side: own scores; statistics, routed, without the base route; closed form of `train gates`; additions one by one; routed rows; ten adapters without rows;
# other weights of adapters, and the asked adapter missing.
set -u
EXP=${EXP:-/tmp/exp} STEPS=${STEPS:-150} ROWS=${ROWS:-64} COUNT=${COUNT:-25} THREADS=${THREADS:-2} LAST=${LAST:-5} TOKENS=${TOKENS:-32000} TRACKS=${TRACKS:-own routed closed live again ten variants}
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../../.." && pwd); BEGAN=$(date +%s)
export METEORA_CACHE=$EXP/cache PYTHONPATH=$EXP/site:$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=$THREADS TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton}
W=$EXP/smollm2 D=$EXP/data; A=$W/adapters R=$W/results BASE=${BASE:-$METEORA_CACHE/models/smollm2-135m}; OUT=${OUT:-$EXP/bank-out}; mkdir -p "$W/logs" "$R" "$W/done" "$W/none" "$OUT"
keep() { (cd "$W" && flock 8 && tar -czf "$OUT/.bank" $(ls results/*.json logs/*.log logs/log.txt report.txt */meteora_config.json 2> /dev/null) && mv "$OUT/.bank" "$OUT/bank.tar.gz") 8> "$W/.keep"; }
collect() {  # the report and everything that has ended
    for log in "$W"/logs/*.log; do grep -q -i "error\|traceback" "$log" && { echo "== $log"; tail -c 900 "$log" | tr '\r' '\n' | grep -v "pytree\|it/s" | tail -6 | cut -c1-300; }; done
    python3 "$HERE/measure.py" "$D" "$R" report > "$W/report.txt" 2>&1
    keep
    tail -n 50 "$W/logs/log.txt"; cut -c1-220 "$W/report.txt"
    echo "$(ls "$R" | wc -l) results after $(( $(date +%s) - BEGAN )) s"
}
if [ "${1:-}" = start ]; then
    CODE=$EXP/bank-code; mkdir -p "$CODE/notes/lab" && cp -r "$ROOT"/{meteora_core,meteora_cli,kernels,pyproject.toml} "$CODE/" && cp -r "$HERE" "$CODE/notes/lab/" || exit 2
    OUT=$EXP/bank-out setsid bash "$CODE/notes/lab/${HERE##*/}/run.sh" --deadline "$2" > "$EXP/bank-run.log" 2>&1 < /dev/null &
    echo $! > "$EXP/bank-run.pid"; exit
elif [ "${1:-}" = wait ]; then
    while [ $(( $(date +%s) - BEGAN )) -lt "$2" ] && kill -0 "$(cat "$EXP/bank-run.pid")" 2> /dev/null; do sleep 4; keep; done
    kill -0 "$(cat "$EXP/bank-run.pid")" 2> /dev/null && echo "the run goes on" || { echo "the run has ended"; tail -n 12 "$EXP/bank-run.log"; }
    collect; exit
fi
DEADLINE=${DEADLINE:-400}; [ "${1:-}" = --deadline ] && DEADLINE=$2
END=$((BEGAN + DEADLINE - 8)); rm -rf "$W/stopped"; mkdir "$W/stopped"
left() { echo $((END - $(date +%s))); }
limited() {  # through NVIDIA's MPS, if another program has started it in $EXP/mps
    [ "$(left)" -gt 8 ] || return 9
    ( echo get_server_list | CUDA_MPS_PIPE_DIRECTORY=$EXP/mps timeout 5 nvidia-cuda-mps-control > /dev/null 2>&1 && export CUDA_MPS_PIPE_DIRECTORY=$EXP/mps
      exec timeout -s INT -k 4 "$(left)" "$@" )
}
say() { echo "$(date +%H:%M:%S) $(( $(date +%s) - BEGAN )) s: $*" >> "$W/logs/log.txt"; }
met() { limited python3 -m meteora_cli "$@"; }
measure() { local name=$1; shift; limited python3 "$HERE/measure.py" "$D" "$R" "$name" --base "$BASE" --rows "$ROWS" --general "$W/general.jsonl" --deadline "$END" ${MEASURE:-} "$@"; }
once() { [ -f "$W/done/$1" ] && return 0; local step=$1 began=$(date +%s); shift; "$@" >> "$W/logs/$step.log" 2>&1 && touch "$W/done/$step" && say "$step: $(( $(date +%s) - began )) s" && keep || { say "$step has not ended"; touch "$W/stopped/$step"; return 1; }; }
until_done() { while [ ! -f "$W/done/$1" ]; do [ "$(left)" -gt 10 ] && [ ! -f "$W/stopped/$1" ] || { touch "$W/stopped/${2:-$1}"; return 1; }; sleep 0.5; done; }

while [ ! -f "$BASE/meteora_source.json" ] || [ ! -d "$D" ]; do [ "$(left)" -gt 60 ] || { cat "$W/logs/convert.log"; echo "the base is not converted, or there are no datasets"; exit 3; }; sleep 1; done
tasks=($(ls "$D" | grep -v composite | head -n "$COUNT")); [ ${#tasks[@]} -gt 5 ] || { echo "the datasets are missing in $D"; exit 3; }
ten=(); for name in abstract_narrative_understanding alpaca disfl_qa goal_step_wikihow linguistics_puzzles logical_deduction news_commentary_de question_selection strategyqa winowhy; do
    [[ " ${tasks[*]} " = *" $name "* ]] && ten+=("$name"); done
printf '[train_adapters]\nmax_length = %s\ntogether_rows = 56\nlearning_rate = 1e-3\nloss_on = "response"\ndropout = 0.0\nsave_steps = 25\ngradient_checkpointing = true\n[train_gates]\nmax_length = 512\nridge_tokens = %s\n' \
    "${LENGTH:-512}" "${RIDGE_TOKENS:-200000}" > "$W/meteora.toml"
export CONFIG="--config $W/meteora.toml"

train() {  # part of the adapters, and then their statistics
    local mine=()
    trap 'for step in train-$1 ship-$1; do [ -f "$W/done/$step" ] || touch "$W/stopped/$step"; done' RETURN
    for index in "${!tasks[@]}"; do [ $((index % 4)) = "$1" ] && mine+=("${tasks[index]}"); done
    once "train-$1" met $CONFIG train adapters --base "$BASE" --data "$D" --adapters "$A" --task "$(IFS=,; echo "${mine[*]}")" --together --rank 8 --max-steps "$STEPS" --batch-size 8 --resume &&
        once "ship-$1" limited python3 "$HERE/ship.py" "$BASE" "$A" "$D" "$TOKENS" "${mine[@]}"
}
all() { for part in 0 1 2 3; do until_done "$1-$part" || return 1; done; }
own() { all train || { touch "$W/stopped/own"; return 1; }; once own measure own --adapters "$A" --do scores --configs own; }
routed() {
    all ship || { touch "$W/stopped/route"; return 1; }
    once route met route "$A" --base "$BASE" --data "$D" --out "$W/routed" --force && once routed measure routed --checkpoint "$W/routed" &&
        once plain-copy cp -rl "$W/routed" "$W/plain" && once drop met adapters drop "$W/plain" no_adapter && once plain measure plain --checkpoint "$W/plain"
}
closed() {
    all train || { touch "$W/stopped/closed"; return 1; }
    once closed-gates met $CONFIG train gates --base "$BASE" --adapters "$A" --data "$D" --task "$(IFS=,; echo "${tasks[*]}")" --out "$W/closed" --init ridge --max-steps 0 --answer-share 0.8 --batch-size 40 --force || { touch "$W/stopped/closed"; return 1; }
    once closed measure closed --checkpoint "$W/closed" --do routing,scores
}
live() { until_done route && once live limited python3 "$HERE/live.py" "$BASE" "$A" "$D" "$W/routed" "$R/live.json" --last "$LAST"; }
again() { until_done route && { until_done closed; once again-route met route "$A" --base "$BASE" --data "$D" --out "$W/again" --routed-rows --force; } && once again measure again --checkpoint "$W/again" --do routing,scores; }
variants() {
    local few=(--base "$BASE" --rows "$((ROWS / 2))" --deadline "$END" ${MEASURE:-})
    until_done route && { until_done live; once variants limited python3 "$HERE/variants.py" "$D" "$R" missing --checkpoint "$W/routed" "${few[@]}"; } &&
        once base limited python3 "$HERE/measure.py" "$D" "$R" base --adapters "$A" --do scores --configs base "${few[@]}"
}
prepare_ten() {
    rm -rf "$W/ten" "$W/bare" "$W/alone"; mkdir -p "$W/ten" "$W/bare" "$W/alone"
    for name in "${ten[@]}"; do cp -rl "$A/$name" "$W/ten/"; for folder in bare alone; do cp -rl "$A/$name" "$W/$folder/"; rm -f "$W/$folder/$name/gate_stats.safetensors"; done; done
    python3 - "$D" "$W/bare" "${ten[@]}" <<'P'
import json, sys
from pathlib import Path
data, bare, *names = sys.argv[1:]
for name in names:  # 16 prompts without answers, of train rows
    rows = [json.loads(line) for line in (Path(data) / name / "train.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows if len(row["prompt"]) < 1500][:16]
    (Path(bare) / name / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
P
}
ten() {
    until_done own; all ship && once ten-prepare prepare_ten && local picked=$(IFS=,; echo "${ten[*]}") &&
        once ten-route met route "$W/ten" --base "$BASE" --data "$D" --out "$W/from-rows" --force && once ten measure ten --checkpoint "$W/from-rows" --do routing,scores --tasks "$picked" &&
        once examples-route met route "$W/bare" --base "$BASE" --data "$W/none" --self-written --out "$W/from-examples" --force && once examples measure examples --checkpoint "$W/from-examples" --do routing,scores --tasks "$picked" &&
        once alone-route met route "$W/alone" --base "$BASE" --data "$W/none" --self-written --out "$W/from-itself" --force && once written measure written --checkpoint "$W/from-itself" --do routing,scores --tasks "$picked"
}
for part in 0 1 2 3; do train $part & done
for track in $TRACKS; do $track & done
wait
collect
