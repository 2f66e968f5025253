"""Paths of fused groups with 28 adapters of rank 8: `groups.py warm GROUP TOKENS...` compiles, `groups.py time TOKENS...` times each group alone.

Needs the folders 2026-11-29-many-adapters and 2026-11-30-random-sizes on the path. Prints microseconds; writes groups.json to $OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import SHAPES, graphs
from measured import measure
from mixed import group_of

from meteora_kernels import Group, Routing
from meteora_kernels.group import PATHS, row_for
from meteora_kernels.plan import Row

COPIES = {"qkv": 3, "o": 5, "gu": 1, "down": 2}
ROWS = (
    [Row("split", pieces=pieces) for pieces in (0, 1, 2, 4, 8)]
    + [Row("packed"), Row("packed", pieces=1)]
    + [Row("wide", pieces=pieces) for pieces in (0, 1, 2, 4)]
)


def works_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    here = group.wide.new_rows(len(x), x).copy_(x)  # type: ignore[union-attr]
    taken = row_for(group, len(x), 2, in_place=True, aligned=True)
    works: dict[str, Callable[[], object]] = {"linear": lambda: F.linear(x, group.weights)}
    works[f"taken ({taken.path} {taken.pieces})"] = lambda: PATHS[taken.path].run(here, group, Routing(2), taken, in_place=True)
    for row in ROWS:
        place = row.path == "wide"
        works[f"{row.path} {row.pieces}"] = lambda row=row, place=place: PATHS[row.path].run(here if place else x, group, Routing(2), row, in_place=place)
    return works


def main(mode: str, names: list[str], sizes: list[int]) -> None:
    found: dict[str, dict[str, float]] = {}
    for tokens in sizes:
        for name in names:
            widths, hidden = SHAPES[name]
            groups = [group_of([8] * 28, hidden, widths) for _ in range(1 if mode == "warm" else COPIES[name])]
            every = [works_of(group, torch.randn(tokens, hidden, device="cuda").bfloat16()) for group in groups]
            works: dict[str, Callable[[], object]] = {}
            measure(f"{tokens} {name}", every, works, found, warm=mode == "warm", file="groups.json")
            graphs.clear()
            del groups, works, every
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            main("warm", [sys.argv[2]], list(map(int, sys.argv[3:])))
        else:
            main("time", list(SHAPES), list(map(int, sys.argv[2:])))
