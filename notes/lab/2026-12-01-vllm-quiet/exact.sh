#!/bin/bash
# exact.sh SECONDS OUT FOLDER: greedy answers of the present code against the library's (2026-11-30-vllm/equality.py, whose "start" has made FOLDER elsewhere), and vLLM's sleep mode.
# All at once, or those named in ONLY, beside other work. PARTS also holds equality.tar.xz (the folder), and vLLM's cumem_allocator.abi3.so, which bundle.sh leaves out.
set -u
seconds=$1 out=$2 folder=$3
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../2026-11-30-vllm/machine.sh" || exit 1
export PYTHONPATH=$VLLM_PATH FOLDER=$folder
[ -e "$PARTS/cumem_allocator.abi3.so" ] && cp "$PARTS/cumem_allocator.abi3.so" "$SITE/vllm/"
mkdir -p "$out/exact" "$folder"
[ -e "$folder/ref.json" ] || tar -C "$folder" -xJf "$PARTS/equality.tar.xz"
start() { name=$1; shift; [[ " ${ONLY:-$name} " == *" $name "* ]] || return; OUT="$out/exact" VLLM_CACHE_ROOT=/tmp/exact-cache-$name timeout -k 5 "$seconds" python "$@" > "/tmp/exact-$name.log" 2>&1 & }
start float32 "$here/../2026-11-30-vllm/equality.py" run float32 float32 graphs
VLLM_USE_V2_MODEL_RUNNER=0 start first "$here/../2026-11-30-vllm/equality.py" run first float32 graphs
start bfloat16 "$here/../2026-11-30-vllm/equality.py" run bfloat16 bfloat16 graphs
start fp8 "$here/../2026-11-30-vllm/equality.py" run fp8 bfloat16 eager
start metfp8 "$here/../2026-11-30-vllm/equality.py" run metfp8 bfloat16 eager
start sleep "$here/sleep.py" "$folder/met" bfloat16 "$out/exact/sleep.jsonl"
start sleep8 "$here/sleep.py" "$folder/metfp8" bfloat16 "$out/exact/sleep.jsonl"
wait
cat "$out"/exact/*.jsonl
for name in float32 first bfloat16 fp8 metfp8 sleep sleep8; do [ -e "/tmp/exact-$name.log" ] || continue; echo "==== $name"; grep -v "^$" "/tmp/exact-$name.log" | tail -n "${TAIL:-4}" | cut -c1-400; done
cat /tmp/exact-*.log > "$out/exact/log.txt"
