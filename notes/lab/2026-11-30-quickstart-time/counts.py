"""Prompt tokens and decoding steps of `meteora quickstart`, before and after its limits on prompts and answers.

    python counts.py runs/starter/datasets BASE      # BASE: the local folder of SmolLM2-135M
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from meteora_core.data.rows import read_rows
from meteora_core.generation.batches import plan
from meteora_core.generation.prompts import encode_prompts

BUDGET = 8192
TASKS = (("strategyqa", 40), ("goal_step_wikihow", 40), ("question_selection", 40), ("three_tasks", 3))

data, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
for name, new_tokens, longest, size in (("before", 40, None, None), ("now", 24, 256, 64)):
    tokens = steps = 0
    for task, count in TASKS:
        room = new_tokens * (3 if task == "three_tasks" else 1)
        prompts = encode_prompts([row.prompt for row in read_rows(data, task, "test", 400)], tokenizer)
        if longest is not None and task != "three_tasks":
            prompts = [prompt for prompt in prompts if len(prompt.tokens) <= longest]
        batches = plan(prompts[:count], "auto" if size is None else min(size, count), room, BUDGET)
        tokens += sum(len(batch) * len(batch[0].tokens) for batch in batches)
        steps += room * len(batches)
        print(f"{name:6} {task:20} rows up to {prompts[count - 1].index}, batches {[len(batch) for batch in batches]}")
    print(f"{name:6} {tokens:,} prompt tokens with padding, {steps} decoding steps of the base")
