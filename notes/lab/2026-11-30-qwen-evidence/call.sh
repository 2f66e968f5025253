#!/bin/bash
# Starts run.sh in a process session of its own, with a copy of the code, so that it goes on after this call; waits for at most WAIT seconds or the end of the run,
# and copies the results so far into $OUT. Every further call does the rest with the same run. From the repository root; options and variables as for run.sh:
#   OUT=FOLDER call.sh WAIT [ORDER.sh] [--deadline SECONDS]
set -u
export EXP=${EXP:-/tmp/exp}
wait=$1; shift
HERE=$(cd "$(dirname "$0")" && pwd)
if [ ! -f "$EXP/run.pid" ]; then
    mkdir -p "$EXP/code" "$EXP/out" "$EXP/logs"
    cp -r examples meteora_core meteora_cli kernels pyproject.toml README.md "$EXP/code/" && mkdir -p "$EXP/code/notes" && cp -r notes/lab "$EXP/code/notes/" || exit 2
    [ "${1#--}" = "${1:-}" ] && [ -n "${1:-}" ] && { . "$1"; shift; }
    ( cd "$EXP/code" && OUT=$EXP/out exec setsid bash "notes/lab/${HERE##*/}/run.sh" "$@" > "$EXP/logs/run.log" 2>&1 < /dev/null ) &
    echo $! > "$EXP/run.pid"
fi
while [ "$SECONDS" -lt "$wait" ] && kill -0 "$(cat "$EXP/run.pid")" 2>/dev/null; do sleep 1; done
cp "$EXP"/out/* "$OUT/" 2>/dev/null
cp "$EXP/logs/run.log" "$OUT/run.log" 2>/dev/null
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader
kill -0 "$(cat "$EXP/run.pid")" 2>/dev/null && echo "the run goes on" || echo "the run has ended"
tail -n "${LINES_SHOWN:-45}" "$EXP/logs/run.log"
