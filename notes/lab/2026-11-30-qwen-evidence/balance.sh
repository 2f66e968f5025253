#!/bin/bash
# The gates with composite rows once more, with equal weight of tokens instead of tasks, and their scores on single tasks and composites; for BESIDE of run.sh.
# BESIDE="bash balance.sh" BESIDE_AFTER=gates-composites run.sh
set -u
cd "$EXP" || exit 3
W=runs/paper-qwen
python3 - "$W" <<'P' > "$EXP/balance.args" || exit 1
import json, shlex, sys
words = shlex.split(json.load(open(f"{sys.argv[1]}/steps/gates-composites.json"))["command"])[1:]
words[words.index("--out") + 1] = f"{sys.argv[1]}/gates/composites-tokens"
words[words.index("--loss-balance") + 1] = "tokens"
print("\n".join(words))
P
mapfile -t words < "$EXP/balance.args"
python3 -m meteora_cli "${words[@]}" && python3 -m meteora_cli --config "$W/meteora.toml" eval --task all --checkpoint "$W/gates/composites-tokens" --top-k 2 --limit 64 --out "$W/eval/composites-tokens"
