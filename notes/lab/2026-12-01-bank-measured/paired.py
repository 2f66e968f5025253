"""Differences between two sets of gates over the same rows, from the answers that bank.py (2026-12-01-bank-of-25) keeps; also with the first answer of a list alone.

python paired.py DATA WORK ONE OTHER     such as example16 and ten, or routed and own
"""

import json
import math
import re
import sys
from pathlib import Path

import torch

from meteora_core.data.tasks import get_task
from meteora_core.evaluation.runner import test_rows
from meteora_core.evaluation.scoring import evaluate_responses

data, work, one, other = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5]
tasks = sorted(
    file.stem.split(".")[2]
    for file in (work / "results").glob(f"score.{one}.*.json")
    if (work / "results" / f"score.{other}.{file.stem.split('.')[2]}.json").exists()
)


def first(text: str) -> str:
    """The first entry of a numbered list, or the first line of another answer."""
    return re.sub(r"^\s*1[.)]\s*", "", text.strip()).partition("\n")[0]


def hits(config: str, name: str, alone: bool) -> tuple[torch.Tensor, int]:
    """Whether each answer is right, and how many answers are numbered lists."""
    answers = json.loads((work / "results" / f"score.{config}.{name}.json").read_text())["answers"]
    rows = test_rows(data, get_task(name), len(answers))
    found = evaluate_responses(get_task(name), [first(text) if alone else text for text in answers], [row.response for row in rows], "corrected")
    return torch.tensor([row["accuracy"] for row in found.rows], dtype=torch.float64), sum(bool(re.match(r"\s*1[.)]", text)) for text in answers)


for alone in (False, True):
    means, variance, changes = [0.0, 0.0], 0.0, []
    print("the first answer alone" if alone else "whole answers")
    for name in tasks:
        (a, lists_a), (b, lists_b) = hits(one, name, alone), hits(other, name, alone)
        print(f"| {name} | {a.mean():.3f} | {b.mean():.3f} | {len(a)} rows, lists: {lists_a}, {lists_b} |")
        means = [mean + part.mean().item() / len(tasks) for mean, part in zip(means, (a, b), strict=True)]
        variance += ((a - b).var() / len(a)).item()
        changes.append((a - b).mean().item())
    over = torch.tensor(changes).std().item() / math.sqrt(len(tasks))
    print(
        f"average {means[0]:.4f} / {means[1]:.4f} = {means[0] / means[1]:.3f} ± {math.sqrt(variance) / len(tasks) / means[1]:.3f} (rows), ± {over / means[1]:.3f} (tasks)"
    )
