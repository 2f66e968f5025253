#!/bin/bash
# Puts packages, the base and the rows of the experiment into $EXP (default: /tmp/exp) on a machine without a network: joins and converts a GGUF file that
# arrives in parts, and unpacks the rest. From the repository root; it may be called any number of times, and a second call waits for the first.
#   prepare.sh pack FILE.gguf SIZE   where there is a network: splits the GGUF file and packs $EXP/$WORK/{datasets,steps} into $FROM
#                                    (made before by `python -m examples.paper qwen --raw-dir raw --only datasets` in $EXP, which also fetches the base),
#                                    and the tokenizer as tiny.tar.gz, a folder tiny/ for smoke.sh
#   prepare.sh carry                 on the machine: keeps what $FROM holds at the moment; starts smoke.sh, and the conversion once the GGUF file is complete,
#                                    in the background
#   prepare.sh                       the same, but waits for the conversion and fails if anything is missing
# $FROM may also hold site.tar.gz, a folder of packages that the machine lacks. WORK is the experiment's folder in $EXP (default: runs/paper-qwen).
set -u
EXP=${EXP:-/tmp/exp} FROM=${FROM:-parts} WORK=${WORK:-runs/paper-qwen} SIZE_OF_GGUF=491400064 HERE=$(cd "$(dirname "$0")" && pwd)
export METEORA_CACHE=$EXP/cache
if [ "${1:-}" = pack ]; then
    mkdir -p "$FROM"
    split -b "$3" -d -a 2 "$2" "$FROM/part-" && (cd "$EXP" && tar -czf - $WORK/{datasets,steps} $(ls -d $WORK/eval 2>/dev/null)) > "$FROM/data.tar.gz"
    tar -C "$METEORA_CACHE/models/qwen2.5-coder-0.5b" --transform 's,^,tiny/,' -czf "$FROM/tiny.tar.gz" tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json
    exit
fi
work=$EXP/$WORK base=$METEORA_CACHE/models/qwen2.5-coder-0.5b
mkdir -p "$EXP/parts" "$work" "$EXP/logs" "$METEORA_CACHE/models"
exec 9> "$EXP/.prepare"; flock 9
for file in "$FROM"/*; do [ -f "$file" ] && [ ! -f "$EXP/parts/${file##*/}" ] && cp "$file" "$EXP/parts/.new" && mv "$EXP/parts/.new" "$EXP/parts/${file##*/}"; done
[ -f "$EXP/parts/site.tar.gz" ] && [ ! -d "$EXP/site" ] && mkdir -p "$EXP/site.new" && tar -C "$EXP/site.new" -xzf "$EXP/parts/site.tar.gz" && mv "$EXP/site.new" "$EXP/site"
export PYTHONPATH=$EXP/site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
if [ "${1:-}" != carry ] && [ ! -f "$EXP/.checked" ]; then
    python3 - <<'CHECK' || exit 2
import importlib
missing, versions, unused = [], [], ("datasets",)  # only for datasets of the hub and token caches
for name in ("torch", "transformers", "peft", "accelerate", "huggingface_hub", "datasets", "pyarrow", "pandas", "dill", "multiprocess", "xxhash", "fsspec", "safetensors", "tokenizers", "gguf", "pydantic", "pydantic_settings", "typer", "rich", "prompt_toolkit", "httpx", "regex", "filelock", "tqdm", "jinja2", "sacrebleu", "rouge", "matplotlib", "meteora_core", "meteora_cli.app", "meteora_kernels", "examples.paper"):
    try:
        module = importlib.import_module(name)
        if not getattr(module, "__file__", None):
            missing.append(name)
        versions.append(f"{name} {getattr(module, '__version__', '')}".strip())
    except Exception as error:
        (versions if name in unused else missing).append(f"{name} ({type(error).__name__}: {error})")
print(", ".join(versions))
if missing:
    raise SystemExit("missing on this machine: " + ", ".join(missing))
CHECK
    touch "$EXP/.checked"
fi
have=$([ -f "$base/meteora_source.json" ] && echo $SIZE_OF_GGUF || cat "$EXP"/parts/part-* 2>/dev/null | wc -c)
[ -d "$work/datasets" ] || [ ! -f "$EXP/parts/data.tar.gz" ] || tar -C "$EXP" -xzf "$EXP/parts/data.tar.gz" || exit 3
mkdir -p "$work/adapters" "$EXP/raw"
ln -sfn "$work/adapters" "$EXP/adapters"; ln -sfn "$work" "$EXP/work"; ln -sfn "$work/datasets" "$EXP/data"; ln -sfn "$base" "$EXP/base"
if [ -f "$EXP/parts/tiny.tar.gz" ] && [ -d "$work/datasets" ] && [ ! -f "$EXP/logs/smoke.log" ]; then
    EXP=$EXP WORK=$WORK setsid bash "$HERE/smoke.sh" > "$EXP/logs/smoke.log" 2>&1 < /dev/null 9>&- &
fi
echo "parts: $have of $SIZE_OF_GGUF bytes; data: $(ls "$work/datasets" 2>/dev/null | wc -l) datasets; smoke: $(grep -a '^smoke' "$EXP/logs/smoke.log" 2>/dev/null | tail -1)"
grep -qa '^smoke: failed' "$EXP/logs/smoke.log" 2>/dev/null && tail -c 3000 "$EXP/logs/smoke.log"
if [ "${1:-}" = carry ]; then
    if [ "$have" = $SIZE_OF_GGUF ] && [ ! -f "$base/meteora_source.json" ] && [ ! -f "$EXP/logs/convert.log" ]; then
        FROM=$EXP/parts setsid bash "$0" > "$EXP/logs/convert.log" 2>&1 < /dev/null 9>&- &
    fi
    exit 0
fi
[ -d "$work/datasets" ] || { echo "the datasets are missing"; exit 3; }
if [ ! -f "$base/meteora_source.json" ]; then
    [ "$have" = $SIZE_OF_GGUF ] || { echo "the GGUF file is not complete"; exit 3; }
    mkdir -p "$EXP/gguf"
    cat "$EXP"/parts/part-* > "$EXP/gguf/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    OMP_NUM_THREADS=8 python3 -c "
from pathlib import Path
from meteora_core.fetch.base_models import catalog_entry, convert_gguf
entry = catalog_entry('qwen2.5-coder-0.5b')
convert_gguf(entry, Path('$EXP/gguf') / entry.gguf, Path('$base'))" || exit 4
    rm -f "$EXP"/parts/part-*
fi
echo "prepared at $SECONDS s: $(ls "$EXP/base/" | wc -l) files of the base, $(ls "$EXP/data/" | wc -l) datasets"
