#!/bin/bash
# Puts the base and the rows of the experiment into $EXP (default: /tmp/exp) on a machine without a network: joins and converts a GGUF file that arrives in
# parts, and unpacks the datasets. From the repository root; it may be called any number of times, and a second call waits for the first.
#   prepare.sh pack FILE.gguf SIZE   where there is a network: splits the GGUF file and packs $EXP/runs/paper-qwen/{datasets,steps} into $FROM
#                                    (made before by `python -m examples.paper qwen --raw-dir raw --only datasets` in $EXP, which also fetches the base)
#   prepare.sh carry                 on the machine: keeps what $FROM holds at the moment; converts as soon as the GGUF file is complete
#   prepare.sh                       the same, and fails if anything is missing
set -u
EXP=${EXP:-/tmp/exp} FROM=${FROM:-parts}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} METEORA_CACHE=$EXP/cache
if [ "${1:-}" = pack ]; then
    mkdir -p "$FROM"
    split -b "$3" -d -a 2 "$2" "$FROM/part-" && tar -C "$EXP" -czf "$FROM/data.tar.gz" runs/paper-qwen/datasets runs/paper-qwen/steps
    exit
fi
python3 - <<'CHECK' || exit 2
import importlib
missing = []
for name in ("torch", "transformers", "peft", "datasets", "pyarrow", "safetensors", "gguf", "pydantic", "pydantic_settings", "typer", "rich", "sacrebleu", "rouge", "matplotlib"):
    try:
        module = importlib.import_module(name)
        if not getattr(module, "__file__", None):
            missing.append(name)
    except ImportError as error:
        missing.append(f"{name} ({error})")
if missing:
    raise SystemExit("missing on this machine: " + ", ".join(missing))
CHECK
work=$EXP/runs/paper-qwen base=$METEORA_CACHE/models/qwen2.5-coder-0.5b
mkdir -p "$EXP/parts" "$work" "$METEORA_CACHE/models"
for file in "$FROM"/*; do [ -f "$file" ] && [ ! -f "$EXP/parts/${file##*/}" ] && cp "$file" "$EXP/parts/.new" && mv "$EXP/parts/.new" "$EXP/parts/${file##*/}"; done
have=$(cat "$EXP"/parts/part-* 2>/dev/null | wc -c)
echo "parts: $have of 491400064 bytes; data: $(ls "$EXP/parts/data.tar.gz" 2>/dev/null || echo missing)"
[ "${1:-}" = carry ] && [ "$have" != 491400064 ] && exit 0
exec 9> "$EXP/.prepare"; flock 9
[ -d "$work/datasets" ] || tar -C "$EXP" -xzf "$EXP/parts/data.tar.gz" || exit 3
mkdir -p "$work/adapters" "$EXP/raw"
ln -sfn "$work/adapters" "$EXP/adapters"
ln -sfn "$work" "$EXP/work"; ln -sfn "$work/datasets" "$EXP/data"; ln -sfn "$base" "$EXP/base"
if [ ! -f "$base/meteora_source.json" ]; then
    [ "$have" = 491400064 ] || { echo "the GGUF file is not complete"; exit 3; }
    mkdir -p "$EXP/gguf"
    cat "$EXP"/parts/part-* > "$EXP/gguf/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf" && rm -f "$EXP"/parts/part-*
    OMP_NUM_THREADS=8 python3 -c "
from pathlib import Path
from meteora_core.fetch.base_models import catalog_entry, convert_gguf
entry = catalog_entry('qwen2.5-coder-0.5b')
convert_gguf(entry, Path('$EXP/gguf') / entry.gguf, Path('$base'))" || exit 4
fi
echo "prepared at $SECONDS s: $(ls "$EXP/base/" | wc -l) files of the base, $(ls "$EXP/data/" | wc -l) datasets"
