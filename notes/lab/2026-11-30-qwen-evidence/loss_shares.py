"""The share of each task in the language-model loss on responses, if every token has the same weight and tasks take turns by tokens.

    python loss_shares.py DATASETS BASE      # a folder of built datasets, and a local folder of the base model
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from meteora_core.data.rows import available_tasks, read_rows
from meteora_core.training.encoding import count_row_targets, encode_rows

data, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
shares = {}
for task in available_tasks(data):
    if task.startswith("composite_"):
        continue
    rows = encode_rows(read_rows(data, task, "train", 300), tokenizer, 0, 512).rows
    shares[task] = (sum(count_row_targets(row, True) for row in rows) / sum(map(len, rows)), sum(count_row_targets(row, True) for row in rows) / len(rows))
total = sum(share for share, _ in shares.values())
for task, (share, tokens) in sorted(shares.items(), key=lambda entry: entry[1][0]):
    print(f"{task:46} {share / total:7.2%} of the loss, {tokens:6.1f} target tokens a row")
