"""Writes the held-out train rows of datasets as test rows, and shows what a checkpoint answers to them beside its base and the most frequent answer.

    python held_out.py rows datasets held 40               # held/<task>/test.jsonl
    meteora eval --task strategyqa --model base,meteora --data held --limit 40 --max-new-tokens 40 --out held_eval
    python held_out.py show held_eval strategyqa datasets
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from meteora_core.data.rows import read_rows
from meteora_core.json_files import write_jsonl
from meteora_core.training.task_rows import split_held_out


def rows(datasets: Path, held: Path, count: int) -> None:
    for folder in sorted(path for path in datasets.iterdir() if (path / "train.jsonl").is_file()):
        _, kept = split_held_out(read_rows(datasets, folder.name, "train"), 42)
        write_jsonl(held / folder.name / "test.jsonl", [{"prompt": row.prompt, "response": row.response} for row in kept[:count]])


def show(results: Path, task: str, datasets: Path) -> None:
    answers = Counter(row.response.strip() for row in read_rows(datasets, task, "train"))
    usual, times = answers.most_common(1)[0]
    print(f"{task}: the most frequent of {len(answers)} train answers is {usual[:40]!r}, {times / sum(answers.values()):.1%}")
    for model in ("base", "meteora"):
        scores = json.loads(sorted((results / model).glob("results_*.json"))[-1].read_text())["results"][task]
        samples = [json.loads(line) for line in sorted((results / model).glob(f"samples_{task}_*.jsonl"))[-1].read_text().splitlines()]
        given = Counter(sample["filtered_resps"][0] for sample in samples)
        print(f"  {model}: accuracy {scores['acc,none']:.3f}, {len(given)} different answers to {len(samples)} rows")


if __name__ == "__main__":
    if sys.argv[1] == "rows":
        rows(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        show(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
