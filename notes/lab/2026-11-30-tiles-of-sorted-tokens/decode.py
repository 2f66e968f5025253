"""Tiles of `decode_chosen_rows`: `decode.py warm GROUP SIZES...` compiles, `decode.py time SIZES...` times; a size is ADAPTERSxTOKENS.

Needs the folder 2026-11-29-many-adapters on the path. Prints every group's microseconds; writes decode.json to $OUT.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
from common import SHAPES, Group, capture, graphs
from measured import measure

from meteora_kernels import Routing
from meteora_kernels.group import PATHS, decode_chosen_rows, row_for
from meteora_kernels.plan import Row

COPIES = {"qkv": 3, "o": 5, "gu": 1, "down": 2}


def rows_of(first: Row) -> dict[str, Row]:
    """The row of the table, and that row with other tiles."""
    assert first.tile is not None
    found = {"taken": first}
    gates = ((32, 128), (64, 128), (64, 256), (64, 64))
    for pieces in (4, 2):
        for rows, step in gates:
            tile = first.tile._replace(gate_rows=rows, gate_step=step)
            found[f"{rows} {step} pieces {pieces}"] = dataclasses.replace(first, pieces=pieces, tile=tile)
    for change in ({"step": 256, "stages": 3},):
        found[f"64 128 {change}"] = dataclasses.replace(first, tile=first.tile._replace(gate_rows=64, gate_step=128, **change))
    return found


OPTIONS: dict[str, dict[str, object]] = {
    "": {},
    "early": {"EARLY": True, "launch_pdl": True},
    "early, 16 lines ahead": {"EARLY": True, "launch_pdl": True, "AHEAD": 16},
    "early, 64 lines ahead": {"EARLY": True, "launch_pdl": True, "AHEAD": 64},
}


def with_options(run: Callable[[], object], options: dict[str, object]) -> object:
    decode_chosen_rows.OPTIONS = options
    try:
        return run()
    finally:
        decode_chosen_rows.OPTIONS = {}


def works_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    first = row_for(group.fused, len(x), 2)
    chosen = rows_of(first) if group.adapters > 256 else {"taken": first}
    works: dict[str, Callable[[], object]] = {}
    for name, row in chosen.items():
        works[name] = lambda row=row: PATHS[row.path].run(x, group.fused, Routing(2), row)
    for name, options in OPTIONS.items() if first.path == "decode_chosen_rows" else ():
        works["taken " + name] = lambda options=options: with_options(works["taken"], options)
    return works


def main(mode: str, names: list[str], sizes: list[str]) -> None:
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        count, tokens = map(int, size.split("x"))
        for name in names:
            groups = [Group(name, count, 8) for _ in range(1 if mode == "warm" else COPIES[name])]
            pairs = [(group, group.input(tokens)) for group in groups]
            every = [works_of(group, x) for group, x in pairs]
            works: dict[str, Callable[[], object]] = {}
            if mode != "warm":
                works["base"] = capture(lambda pairs=pairs: [group.base(x) for group, x in pairs])
            measure(f"{size} {name}", every, works, found, warm=mode == "warm", file="decode.json")
            graphs.clear()
            del groups, works, every, pairs
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            main("warm", [sys.argv[2]], sys.argv[3:])
        else:
            main("time", list(SHAPES), sys.argv[2:])
