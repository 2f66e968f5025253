"""Tiles of the launches of `many_adapters` where tokens are sorted, cold weights; `tiles.py warm GROUP TOKENS...` compiles, `tiles.py time TOKENS...` times."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from common import SHAPES, Group, capture, graphs, times
from steps import ROUTING, adapters_of

from meteora_kernels import many_adapters
from meteora_kernels.many_adapters import base_product, launch
from meteora_kernels.many_adapters.launch import blocks_down, blocks_up, gate_sums, sort_tokens

SIZES = (16, 32, 64)
UPS = ((128, 4), (256, 4), (512, 4), (512, 8), (256, 2))
DOWNS = ((128, 4, 4, 1600), (128, 4, 4, 8192), (128, 4, 6, 4096), (128, 2, 4, 4096), (128, 2, 4, 16384))


def works_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    adapters, works = adapters_of(group), {}
    logits = gate_sums(x, adapters)
    y = torch.empty(len(x), group.outputs, dtype=x.dtype, device="cuda")
    base = base_product(x, group.packed[: group.outputs], len(x) <= many_adapters.EXACT_TOKENS)
    works["sort"] = lambda: sort_tokens(logits, adapters, ROUTING)
    for size in SIZES:
        found = sort_tokens(logits, adapters, ROUTING, size)
        middle = blocks_down(x, found, adapters, 2)

        def up(tile: tuple[int, int], found: launch.Sorted = found, middle: torch.Tensor = middle) -> None:
            launch.UP_TILE = tile
            blocks_up(base, None, middle, found, adapters, y)

        def down(tile: tuple[int, int, int, int], found: launch.Sorted = found) -> None:
            launch.DOWN_TILE = tile
            blocks_down(x, found, adapters, 2)

        for tile in UPS:
            works[f"up{size}:{tile[0]},{tile[1]}"] = lambda tile=tile, up=up: up(tile)
        for tile in DOWNS:
            works[f"dn{size}:{tile[1]},{tile[2]},{tile[3]}"] = lambda tile=tile, down=down: down(tile)
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
