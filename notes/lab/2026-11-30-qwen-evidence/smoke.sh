#!/bin/bash
# Every kind of command of the experiment once, on a random model of two layers with the base's tokenizer, while the base is still on its way.
# EXP=FOLDER smoke.sh, from the repository root after prepare.sh has unpacked packages, datasets and the tokenizer; the last line says "smoke: …".
set -u
EXP=${EXP:-/tmp/exp} LAB=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$LAB:$EXP/site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} METEORA_CACHE=$EXP/cache HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 TRITON_CACHE_DIR=$EXP/triton
[ -d "$EXP/tiny" ] || tar -C "$EXP" -xzf "$EXP/parts/tiny.tar.gz" || exit 1
base=$EXP/tiny out=$EXP/smoke data=$EXP/${WORK:-runs/paper-qwen}/datasets
mkdir -p "$out"
at() { echo "smoke: $1 at $SECONDS s"; }
failed() { echo "smoke: failed in $1 at $SECONDS s"; exit 1; }
python3 - "$base" <<'P' || failed "the model"
import sys
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
torch.manual_seed(0)
config = Qwen2Config(vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=False, eos_token_id=151645, bos_token_id=151643)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
print(AutoTokenizer.from_pretrained(sys.argv[1]).eos_token, "GPUs:", torch.cuda.device_count())
P
tasks=logical_deduction,question_selection,strategyqa
meteora() { python3 -m meteora_cli "$@"; }
train="--base $base --data $data --adapters $out/adapters --save-steps 1 --max-length 256 --list-rows 0.25 --list-max 10"
at "adapters"; meteora train adapters --task $tasks --together --rank 8 --max-steps 2 --batch-size 8 --resume $train --loss-on response > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "train adapters"; }
at "LoRA-B"; meteora train adapters --task all --max-rows 40 --balanced --name lora_b --rank 24 --list-rows 0.25 --list-max 10 --max-length 256 --max-steps 1 --batch-size 8 --out "$out/lora_b" --base "$base" --data "$data" > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "LoRA-B"; }
at "gates"; meteora train gates --out "$out/ridge" --init ridge --lr 1e-2 --answer-share 0.7 --max-steps 2 --batch-size 8 --resume $train > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "gates"; }
at "joined rows"; meteora train gates --out "$out/joined" --init ridge --joined-rows 0.5 --joined-max 3 --lr 1e-2 --answer-share 0.7 --max-steps 1 --batch-size 4 --accumulation 2 --resume $train > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "joined rows"; }
at "composite rows"; meteora train gates --out "$out/composites" --init ridge --trainable gates+adapters --loss-on response --loss-balance tasks --adapter-lr 5e-4 --composite-rows 0.5 --composite-max 3 --max-steps 1 --batch-size 4 --accumulation 2 $train > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "composite rows"; }
given="--data $data --limit 2 --max-new-tokens 8 --base $base"
at "base"; meteora eval --task strategyqa,composite_3 --model base --out "$out/eval" $given > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "eval of the base"; }
at "own"; meteora eval --task $tasks --model own --adapters "$out/adapters" --out "$out/eval" $given > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "eval of the adapters"; }
at "routing"; meteora eval --task strategyqa,composite_3 --checkpoint "$out/ridge" --top-k 2 --routing --out "$out/eval" --data "$data" --limit 2 --max-new-tokens 8 > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "eval of the gates"; }
at "segments"; python3 "$LAB/segments.py" "$out/ridge" --data "$data" --adapters "$out/adapters" --base "$base" --out "$out/segments.json" --rows 2 --composites 3 --most 8 > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "segments.py"; }
at "parts"; python3 "$LAB/../2026-12-01-switching-tasks/parts.py" "$out/ridge" "$out/joined" --data "$data" --adapters "$out/adapters" --base "$base" --out "$out/parts.json" --rows 2 --composites 3 > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "parts.py"; }
at "routers"; meteora eval --task $tasks --model router:oracle,router:centroid,router:spectr,router:arrow,router:closed-form --seeds 42 --adapters "$out/adapters" --out "$out/eval" $given > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "routers"; }
at "phatgoose"; meteora eval --task $tasks --model router:phatgoose --seeds 42 --adapters "$out/adapters" --out "$out/eval" $given > "$out/log" 2>&1 || { tail -30 "$out/log"; failed "phatgoose"; }
at "all passed"
