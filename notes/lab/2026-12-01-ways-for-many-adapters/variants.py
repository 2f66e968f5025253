"""Ways of `many_adapters` and their steps with several tiles, each group of a layer of Llama-3-8B alone, weights not in the cache.

`variants.py warm GROUP SIZES...` compiles every variant and checks the ways against float64 and a second run; `variants.py time SECONDS SIZES...` times until
SECONDS have passed. A size is ADAPTERSxTOKENS, rank 8, top-2. Needs the folder 2026-11-29-many-adapters on the path, and runs at commit 294a54b, because
blocks of more than four tokens and B without a base (blocks-and-base-last.patch) were not kept. Prints sums over the four groups and
every group, in microseconds, and appends them to variants.jsonl in $OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import SHAPES, Group, capture, check, graphs, times

from meteora_kernels import Routing, many_adapters
from meteora_kernels.many_adapters import launch
from meteora_kernels.steps.products import library_products

ROUTING = Routing(2, 1.0)
COPIES = {"qkv": 3, "o": 5, "gu": 1, "down": 2}
KINDS = (("", 0), (" local", 16))
ROUTED = ((4, 256, 4), (8, 256, 4), (8, 256, 8), (4, 512, 4), (2, 512, 4))
Work = Callable[[], object]


def one_lora(group: Group) -> Callable[[torch.Tensor], object]:
    """The base with one un-merged LoRA of rank 8, as PEFT computes it."""
    like = group.packed
    downs = [torch.randn(8, group.hidden, dtype=like.dtype, device=like.device) * 0.01 for _ in group.widths]
    ups = [torch.randn(width, 8, dtype=like.dtype, device=like.device) * 0.01 for width in group.widths]
    each = list(zip(group.weights, downs, ups, strict=True))
    return lambda x: [F.linear(x, weight) + F.linear(F.linear(x, down), up) * 2.0 for weight, down, up in each]


@contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Other tiles of the launches."""
    before = {name: getattr(launch, name) for name in values}
    try:
        for name, value in values.items():
            setattr(launch, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)


def with_constants(work: Callable[..., Any], arguments: tuple[Any, ...], **values: Any) -> Any:
    with constants(**values):
        return work(*arguments)


def library_gates(x: torch.Tensor, adapters: Any) -> torch.Tensor:
    """Logits of all members by the library, in float32 (members, M, N)."""
    hidden, stride = x.shape[1], adapters.gate.stride(0)
    rows = adapters.gate.as_strided((adapters.members, hidden, adapters.number), (adapters.member_rows * stride, 1, stride))
    return torch.bmm(x.expand(adapters.members, *x.shape), rows, out_dtype=torch.float32)


def together_forward(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, adapters: Any, routing: Routing) -> torch.Tensor:
    """A with the slots sorted together, B by short blocks: two sorts."""
    y = torch.empty(len(x), len(weights), dtype=x.dtype, device=x.device)
    sums = launch.gate_sums(x, adapters)
    middle = launch.blocks_down(x, launch.sort_tokens(sums, adapters, routing, together=True), adapters)
    found = launch.sort_tokens(sums, adapters, routing)
    launch.blocks_up(many_adapters.base_product(x, weights), bias, middle, found, adapters, y)
    return y


def base_last(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, adapters: Any, routing: Routing, *, routed: bool = False) -> torch.Tensor:
    """B into the output, then the base's product added to it by the library."""
    y = torch.empty(len(x), len(weights), dtype=x.dtype, device=x.device)
    found = launch.sort_tokens(launch.gate_sums(x, adapters), adapters, routing, together=routed)
    (launch.routed_up if routed else launch.blocks_up)(None, bias, launch.blocks_down(x, found, adapters), found, adapters, y)
    return y.addmm_(x, weights.t())


def rounded_few(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, adapters: Any, routing: Routing) -> torch.Tensor:
    """"few" with a base product in 16 bits."""
    before, many_adapters.library_products = many_adapters.library_products, lambda x, weights, pieces: F.linear(x, weights)
    try:
        return many_adapters.few_forward(x, weights, bias, adapters, routing)
    finally:
        many_adapters.library_products = before


def ways_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    arguments = (x, group.packed[: group.outputs], None, group.fused.adapters, ROUTING)
    ways: dict[str, Callable[[], torch.Tensor]] = {}
    if len(x) <= 512:
        for pieces in (1, 2, 4, 8) if len(x) <= 256 else (1,):
            ways[f"few {pieces}"] = lambda pieces=pieces: many_adapters.few_forward(*arguments, pieces)
        ways["few rounded"] = lambda: rounded_few(*arguments)
    if len(x) >= 128:
        ways["sorted"] = lambda: many_adapters.sorted_forward(*arguments)
        ways["sorted together"] = lambda: together_forward(*arguments)
        for tile in ROUTED[:3]:
            ways[f"sorted_down {tile}"] = lambda tile=tile: with_constants(many_adapters.sorted_down_forward, arguments, ROUTED_UP=tile)
    if len(x) >= 512:
        ways["sorted_down, base last"] = lambda: base_last(*arguments, routed=True)
        for short in (4, 8, 16):
            ways[f"sorted {short}, base last"] = lambda short=short: with_constants(base_last, arguments, SHORT=short)
    return ways


def steps_of(group: Group, x: torch.Tensor, kind: str) -> dict[str, Work]:
    adapters, weights = group.fused.adapters, group.packed[: group.outputs]
    sums = launch.gate_sums(x, adapters)
    steps: dict[str, Work] = {}
    if not kind:
        steps |= {"linear": lambda: F.linear(x, weights), "gates": lambda: launch.gate_sums(x, adapters), "gates library": lambda: library_gates(x, adapters)}
        for pieces in (1, 2, 4, 8) if len(x) <= 256 else (1,):
            steps[f"float32 {pieces}"] = lambda pieces=pieces: library_products(x, weights, pieces)
    if len(x) < 512:
        return steps
    y, base = torch.empty(len(x), group.outputs, dtype=x.dtype, device="cuda"), F.linear(x, weights)
    apart, together = (launch.sort_tokens(sums, adapters, ROUTING, together=each) for each in (False, True))
    middle = launch.blocks_down(x, together, adapters)
    steps |= {
        "sort": lambda: launch.sort_tokens(sums, adapters, ROUTING),
        "sort together": lambda: launch.sort_tokens(sums, adapters, ROUTING, together=True),
        "down": lambda: launch.blocks_down(x, apart, adapters),
        "up": lambda: launch.blocks_up(base, None, middle, apart, adapters, y),
    }
    for tile in ((128, 1, 4, 4096), (128, 1, 4, 2048), (256, 1, 4, 4096), (128, 2, 4, 4096)):
        steps[f"down together {tile}"] = lambda tile=tile: with_constants(launch.blocks_down, (x, together, adapters), DOWN_TILE=tile)
    steps["up without base"] = lambda: launch.blocks_up(None, None, middle, apart, adapters, y)
    steps["routed_up without base"] = lambda: launch.routed_up(None, None, middle, together, adapters, y)
    steps["addmm"] = lambda: y.addmm_(x, weights.t())
    for short in (8, 16):
        with constants(SHORT=short):
            blocks = launch.sort_tokens(sums, adapters, ROUTING)
        for each in ((256, 1), (256, 2)):
            rest = {"SHORT": short, "ROWS_UP": each}
            steps[f"up {short} {each}"] = lambda blocks=blocks, rest=rest: with_constants(launch.blocks_up, (base, None, middle, blocks, adapters, y), **rest)
            steps[f"up {short} {each} without base"] = lambda blocks=blocks, rest=rest: with_constants(launch.blocks_up, (None, None, middle, blocks, adapters, y), **rest)
    with constants(SIZE=32):
        larger = launch.sort_tokens(sums, adapters, ROUTING, together=True)
    steps["down together, 32"] = lambda: with_constants(launch.blocks_down, (x, larger, adapters), SIZE=32)
    for tile in ROUTED:
        steps[f"routed_up {tile}"] = lambda tile=tile: with_constants(launch.routed_up, (base, None, middle, together, adapters, y), ROUTED_UP=tile)
    return steps


def warm(name: str, sizes: list[str]) -> None:
    for size in sizes:
        adapters, tokens = map(int, size.split("x"))
        group = Group(name, adapters, 8)
        for kind, pool in KINDS:
            x = group.input(tokens, pool)
            for key, work in ways_of(group, x).items():
                try:
                    y = work()
                    print(name, size, key + kind, check(group, x, y), "" if torch.equal(work(), y) else "NOT EQUAL", flush=True)
                except Exception:
                    print(name, size, key, "FAILED", traceback.format_exc()[-400:], flush=True)
            for key, step in steps_of(group, x, kind).items() if not kind else ():
                try:
                    step()
                    torch.cuda.synchronize()
                except Exception:
                    print(name, size, key, "FAILED", traceback.format_exc()[-400:], flush=True)
        del group
        torch.cuda.empty_cache()


def timed(seconds: float, sizes: list[str]) -> None:
    end = time.monotonic() + seconds
    for size in sizes:
        count, tokens = map(int, size.split("x"))
        totals: dict[str, list[float]] = {}
        for name, copies in COPIES.items():
            if time.monotonic() > end:
                print(f"{size} {name}: no time left", flush=True)
                return
            groups = [Group(name, count, 8) for _ in range(copies)]
            works: dict[str, Work] = {}
            for kind, pool in KINDS:
                pairs = [(group, group.input(tokens, pool)) for group in groups]
                if not pool:
                    works["base"] = capture(lambda pairs=pairs: [group.base(x) for group, x in pairs])
                    loras = [one_lora(group) for group in groups]
                    works["one LoRA"] = capture(lambda pairs=pairs, loras=loras: [lora(x) for (_, x), lora in zip(pairs, loras, strict=True)])
                every: list[dict[str, Work]] = [{"WAY " + key: way for key, way in ways_of(group, x).items()} | steps_of(group, x, kind) for group, x in pairs]
                for key in every[0]:
                    try:
                        works[key + kind] = capture(lambda every=every, key=key: [each[key]() for each in every])
                    except Exception as problem:
                        print(name, size, key, str(problem)[:200], flush=True)
            for key, value in times(works, 9).items():
                totals.setdefault(key, []).append(value / copies)
            graphs.clear()
            del groups, works, every, pairs, loras
            torch.cuda.empty_cache()
        with (Path(os.environ.get("OUT", ".")) / "variants.jsonl").open("a") as file:
            file.write(json.dumps({"size": size, "groups": list(COPIES), "us": totals}) + "\n")
        for key, values in totals.items():
            print(f"{size} {key}: {sum(values):.0f} ({sum(values) / sum(totals['base']):.3f})  {' '.join(f'{value:.0f}' for value in values)}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            warm(sys.argv[2], sys.argv[3:])
        else:
            timed(float(sys.argv[2]), sys.argv[3:])
