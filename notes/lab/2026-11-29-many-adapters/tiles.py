"""Tiles of the launches of `many_adapters` where tokens are sorted, cold weights; `tiles.py warm GROUP TOKENS...` compiles, `tiles.py time TOKENS...` times."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from common import SHAPES, Group, capture, graphs, times
from steps import ROUTING, adapters_of

from meteora_kernels import many_adapters
from meteora_kernels.many_adapters import base_product, launch, tiled
from meteora_kernels.many_adapters.launch import blocks_down, blocks_up, gate_sums, sort_tokens

UPS = ((256, 1), (512, 2), (512, 1))
DOWNS = ((128, 2, 4, 4096), (128, 1, 4, 4096), (128, 1, 3, 8192))
TILED_UPS = ((128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 8, 3), (256, 64, 8, 3), (128, 128, 4, 2), (64, 128, 4, 3))
TILED_DOWNS = ((128, 64, 4, 4, 128), (128, 64, 8, 4, 128), (256, 64, 8, 3, 128), (128, 128, 8, 3, 128), (64, 64, 4, 5, 128), (128, 64, 4, 4, 32))


def works_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    adapters, works = adapters_of(group), {}
    logits = gate_sums(x, adapters)
    y = torch.empty(len(x), group.outputs, dtype=x.dtype, device="cuda")
    base = base_product(x, group.packed[: group.outputs], len(x) <= many_adapters.EXACT_TOKENS)
    works["route"] = lambda: launch.route_tokens(logits, adapters, ROUTING)
    works["sort"] = lambda: sort_tokens(logits, adapters, ROUTING)
    works["list"] = lambda: tiled.list_tiles(logits, adapters, ROUTING)
    found, tiles = sort_tokens(logits, adapters, ROUTING), tiled.list_tiles(logits, adapters, ROUTING)
    middle, inner = blocks_down(x, found, adapters, 2), tiled.tiled_down(x, tiles, adapters, 2)

    def up(tile: tuple[int, ...]) -> None:
        launch.FOURS_UP = tile
        blocks_up(base, None, middle, found, adapters, y)

    def down(tile: tuple[int, ...]) -> None:
        launch.DOWN_TILE = tile
        blocks_down(x, found, adapters, 2)

    def tiled_up(tile: tuple[int, ...]) -> None:
        tiled.UP_TILE = tile
        tiled.tiled_up(base, None, inner, tiles, adapters, y)

    def tiled_down(tile: tuple[int, ...]) -> None:
        tiled.DOWN_TILE = tile
        tiled.tiled_down(x, tiles, adapters, 2)

    for name, run, choices in (("up", up, UPS), ("dn", down, DOWNS), ("lup", tiled_up, TILED_UPS), ("ldn", tiled_down, TILED_DOWNS)):
        for tile in choices:
            works[f"{name}{tile}".replace(" ", "")] = lambda tile=tile, run=run: run(tile)
    return works


with torch.no_grad():
    mode, *rest = sys.argv[1:]
    totals: dict[tuple[int, str], list[float]] = {}
    for name in [rest.pop(0)] if mode == "warm" else SHAPES:
        groups = [Group(name, 256, 8) for _ in range(1 if mode == "warm" else {"qkv": 4, "o": 5, "gu": 1, "down": 2}[name])]
        for tokens in map(int, rest):
            for kind, pool in (("uniform", 0), ("local", 16)):
                every = [works_of(group, group.input(tokens, pool)) for group in groups]
                if mode == "warm":
                    for work in every[0].values():
                        work()
                    continue
                works = {key: capture(lambda every=every, key=key: [works[key]() for works in every]) for key in every[0]}
                found = {key: value / len(groups) for key, value in times(works, 7).items()}
                graphs.clear()
                print(name, tokens, kind, " ".join(f"{key} {value:.0f}" for key, value in found.items()), file=open("/tmp/tiles.txt", "a"))
                for key, value in found.items():
                    totals.setdefault((tokens, key), []).append(value)
    for (tokens, key), values in totals.items():
        print(
            tokens,
            key,
            f"{sum(values[0::2]):.0f} {sum(values[1::2]):.0f}",
            "  groups",
            " ".join(f"{u:.0f}/{l:.0f}" for u, l in zip(values[0::2], values[1::2], strict=True)),
        )
