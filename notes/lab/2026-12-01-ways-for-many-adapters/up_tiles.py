"""Tiles of the pass over the output in `packed`, 28 adapters of rank 8: `up_tiles.py warm GROUP TOKENS...` compiles, `up_tiles.py time TOKENS...` times.

Needs the folders 2026-11-29-many-adapters, 2026-11-30-random-sizes and 2026-11-30-tiles-of-sorted-tokens on the path. Prints microseconds of every group alone;
writes up_tiles.json to $OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import SHAPES, graphs
from groups import COPIES
from measured import measure
from mixed import group_of

from meteora_kernels import Group, Routing
from meteora_kernels.group import PATHS, row_for
from meteora_kernels.plan import Row
from meteora_kernels.steps import up

TILES = ((64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (64, 256, 32, 8, 3), (64, 128, 64, 4, 3), (128, 128, 32, 4, 3), (64, 256, 32, 4, 2))


def packed(group: Group, x: torch.Tensor, tile: tuple[int, ...], pieces: int) -> object:
    before, up.MANY_TILE = up.MANY_TILE, tile
    try:
        return PATHS["packed"].run(x, group, Routing(2), Row("packed", pieces=pieces))
    finally:
        up.MANY_TILE = before


def works_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    here = group.wide.new_rows(len(x), x).copy_(x)  # type: ignore[union-attr]
    taken = row_for(group, len(x), 2, in_place=True, aligned=True)
    works: dict[str, Callable[[], object]] = {"linear": lambda: F.linear(x, group.weights), "whole product": lambda: F.linear(x, group.packed)}
    works[f"taken ({taken.path} {taken.pieces})"] = lambda: PATHS[taken.path].run(here, group, Routing(2), taken, in_place=True)
    for tile in TILES:
        for pieces in (0, 1):
            works[f"packed {pieces} {tile}"] = lambda tile=tile, pieces=pieces: packed(group, x, tile, pieces)
    return works


def main(mode: str, names: list[str], sizes: list[int]) -> None:
    found: dict[str, dict[str, float]] = {}
    for tokens in sizes:
        for name in names:
            widths, hidden = SHAPES[name]
            groups = [group_of([8] * 28, hidden, widths) for _ in range(1 if mode == "warm" else COPIES[name])]
            every = [works_of(group, torch.randn(tokens, hidden, device="cuda").bfloat16()) for group in groups]
            measure(f"{tokens} {name}", every, {}, found, warm=mode == "warm", file="up_tiles.json")
            graphs.clear()
            del groups, every
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            main("warm", [sys.argv[2]], list(map(int, sys.argv[3:])))
        else:
            main("time", list(SHAPES), list(map(int, sys.argv[2:])))
