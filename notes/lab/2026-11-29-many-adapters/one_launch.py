"""Tiles of `decode_chosen` (one launch) at 32 to 128 tokens, each group alone, weights not in the cache."""

from __future__ import annotations

import sys
import traceback

import torch
from common import SHAPES, Group, capture, check, times

from meteora_kernels.triton_chosen import Tile, decode_chosen

TILES = {
    "a": Tile(4, 16, 128, 16, 256, 64, 128, 4, 3),
    "b": Tile(4, 16, 128, 16, 256, 64, 64, 4, 4),
    "c": Tile(8, 32, 64, 16, 256, 128, 64, 4, 3),
    "d": Tile(8, 32, 64, 16, 256, 64, 128, 4, 2),
    "e": Tile(4, 16, 128, 16, 512, 32, 128, 2, 3),
    "f": Tile(4, 16, 128, 16, 512, 128, 64, 8, 4),
}


def call(group: Group, x: torch.Tensor, tile: Tile) -> torch.Tensor:
    weights = group.packed[: group.outputs]
    tensors = (x, weights, group.ga, group.up, None, group.scaling, group.offsets, group.flags)
    return decode_chosen(*tensors, group.widths, group.total, group.gates, group.rank, 2, 1.0, tile=tile)


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
