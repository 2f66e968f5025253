"""Tiles of `decode_chosen_rows` (one launch) at up to 16 tokens; at 32 to 128, as the note has them, with MP of its launcher set to that, each group alone, weights not in the cache."""

from __future__ import annotations

import sys
import traceback

import torch
from common import SHAPES, Group, capture, check, times

from meteora_kernels import Routing
from meteora_kernels.group import decode_chosen_rows
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile


def cut(pieces: int, gate_rows: int, gate_step: int, down_rows: int, down_step: int, outputs: int, step: int, warps: int, stages: int) -> Row:
    tile = Tile(outputs=outputs, step=step, warps=warps, stages=stages, gate_rows=gate_rows, gate_step=gate_step, down_rows=down_rows, down_step=down_step)
    return Row("decode_chosen_rows", pieces=pieces, tile=tile)


TILES = {
    "a": cut(4, 16, 128, 16, 256, 64, 128, 4, 3),
    "b": cut(4, 16, 128, 16, 256, 64, 64, 4, 4),
    "c": cut(8, 32, 64, 16, 256, 128, 64, 4, 3),
    "d": cut(8, 32, 64, 16, 256, 64, 128, 4, 2),
    "e": cut(4, 16, 128, 16, 512, 32, 128, 2, 3),
    "f": cut(4, 16, 128, 16, 512, 128, 64, 8, 4),
}


def call(group: Group, x: torch.Tensor, row: Row) -> torch.Tensor:
    return decode_chosen_rows.run(x, group.fused, Routing(), row)


CHECK = sys.argv[1] in SHAPES
"""`one_launch.py GROUP TOKENS...` compiles and checks (several at a time); `one_launch.py TOKENS...` times."""

with torch.no_grad():
    for name in [sys.argv.pop(1)] if CHECK else SHAPES:
        groups = [Group(name, 256, 8) for _ in range(1 if CHECK else {"qkv": 4, "o": 5, "gu": 1, "down": 2}[name])]
        for tokens in map(int, sys.argv[1:]):
            works, notes = {}, {}
            x, near = groups[0].input(tokens), [group.input(tokens, 16) for group in groups]
            if not CHECK:
                works["base"] = capture(lambda groups=groups, x=x: [group.base(x) for group in groups])
            for key, tile in TILES.items():
                try:
                    if CHECK:
                        notes[key] = check(groups[0], x, call(groups[0], x, tile))
                        continue
                    works[key] = capture(lambda groups=groups, x=x, tile=tile: [call(group, x, tile) for group in groups])
                    works[key + "16"] = capture(
                        lambda groups=groups, near=near, tile=tile: [call(group, x, tile) for group, x in zip(groups, near, strict=True)]
                    )
                except Exception:
                    notes[key] = traceback.format_exc().splitlines()[-1][:100]
                    torch.cuda.synchronize()
            if CHECK:
                print(name, tokens, notes, flush=True)
                continue
            found = {key: value / len(groups) for key, value in times(works, 15).items()}
            print(name, tokens, " ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True)
            for key, note in notes.items():
                print("   ", key, note, flush=True)
