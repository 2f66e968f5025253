#!/bin/bash
# run.sh SECONDS OUT: everything on a machine without a network, from the repository's root; PARTS holds the parts of bundle.sh. Ends by itself after SECONDS.
set -u
begin=$(date +%s) seconds=$1 out=$2
here=$(dirname "$0")
. "$here/../2026-11-30-vllm/machine.sh" || exit 1
export PYTHONPATH=$VLLM_PATH MODELS=${MODELS:-/tmp} LARGE=${LARGE:-/dev/shm}
mkdir -p "$out"
export MODELS LARGE
[ -e "$MODELS/m28x32/made" ] || OMP_NUM_THREADS=4 python "$here/../2026-12-01-vllm/make.py" "$MODELS" 32 28 8 &
[ -e "$LARGE/m256x32/made" ] || OMP_NUM_THREADS=4 python "$here/../2026-12-01-vllm/make.py" "$LARGE" 32 256 8 local &
echo "unpacked after $(($(date +%s) - begin)) s"
python "$here/quiet.py" $((seconds - $(date +%s) + begin)) "$out" "${@:3}"
