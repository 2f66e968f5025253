"""Steps of `many_adapters`, each with several tiles, and the ways as a whole; each group of a layer of Llama-3-8B alone, weights not in the cache.

`variants.py warm GROUP SIZES...` compiles and checks the ways against float64, `variants.py time SIZES...` times; a size is ADAPTERSxTOKENS. Needs the folder
2026-11-29-many-adapters on the path. Prints sums over the four groups, then every group; writes variants.json to $OUT.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import SHAPES, Group, capture, check, graphs, times

from meteora_kernels import plan, run_group
from meteora_kernels.arguments import span_of
from meteora_kernels.many_adapters import few_forward, sorted_forward, sorting
from meteora_kernels.many_adapters.device_tokens import gates_kernel
from meteora_kernels.many_adapters.launch import gate_sums, pieces_of, tokens_down, tokens_up
from meteora_kernels.plan.table import Table
from meteora_kernels.sizes import ceil_div
from meteora_kernels.steps.products import library_products
from meteora_kernels.types import Adapters, Routing

ROUTING = Routing(2, 1.0)
Work = Callable[[], object]
STEPS = (512, 4096)
"""Numbers of tokens with which steps are timed beside the ways."""
COPIES = {"qkv": 3, "o": 5, "gu": 1, "down": 2}
GATES = ((128, 128, 64, 8, 3, 132), (64, 128, 64, 4, 4, 396), (64, 64, 64, 4, 5, 396))
DOWNS = tuple(
    sorting.DownTile(*tile)
    for tile in ((32, 128, 64, 4, 3, 264), (32, 128, 64, 4, 4, 264), (64, 128, 64, 4, 4, 264), (64, 64, 64, 4, 4, 264), (64, 128, 128, 8, 3, 264), (32, 64, 64, 4, 5, 528))
)
UPS = tuple(
    sorting.UpTile(*tile)
    for tile in ((64, 128, 32, 4, 2), (64, 128, 32, 4, 3), (64, 128, 64, 4, 2), (64, 256, 32, 8, 2), (32, 128, 32, 4, 2), (32, 128, 32, 4, 3), (32, 256, 32, 4, 2))
)


def gates(x: torch.Tensor, adapters: Adapters, tile: tuple[int, ...]) -> torch.Tensor:
    bm, bn, bk, warps, stages, wanted = tile
    tokens, hidden = x.shape
    count, members = adapters.number, adapters.members
    programs = ceil_div(count, bn) * members * ceil_div(tokens, bm)
    span = span_of(hidden, pieces_of(programs, wanted, ceil_div(hidden, bk)), bk)
    pieces = ceil_div(hidden, span)
    logits = torch.empty(pieces, tokens, members * count, dtype=torch.float32, device=x.device)
    gates_kernel[(programs * pieces,)](
        x, adapters.gate, logits, logits, tokens, hidden, count, 0, x.stride(0), adapters.gate.stride(0), adapters.member_rows,
        MEMBERS=members, BM=bm, BN=bn, BK=bk, SPAN=span, WHOLE=hidden % span == 0, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return logits


def works_of(group: Group, x: torch.Tensor, kind: str) -> dict[str, Work]:
    """Every step with every tile."""
    adapters, weights, tokens = group.fused.adapters, group.packed[: group.outputs], len(x)
    sums = gate_sums(x, adapters)
    logits = sums.sum(0)
    y = torch.zeros(tokens, group.outputs, dtype=x.dtype, device="cuda")
    works: dict[str, Work] = {
        "list": lambda: sorting.sort_tokens(x, logits, adapters, ROUTING),
        "gates list": lambda: sorting.sort_tokens(x, None, adapters, ROUTING),
    }
    if not kind:
        works["linear"] = lambda: F.linear(x, weights)
        works["addmm"] = lambda: y.addmm_(x, weights.t())
        for pieces in (1, 2, 4, 8) if tokens <= 256 else ():
            works[f"library {pieces}"] = lambda pieces=pieces: library_products(x, weights, pieces)
        works["gates"] = lambda: gate_sums(x, adapters)
        for tile in GATES:
            works[f"gates{tile}".replace(" ", "")] = lambda tile=tile: gates(x, adapters, tile)
        works["gates library"] = lambda: sorting.library_logits(x, adapters)
    if tokens <= 256:
        base = library_products(x, weights, 1)
        chosen = tokens_down(x, sums, adapters, ROUTING)
        works |= {"tokens_down": lambda: tokens_down(x, sums, adapters, ROUTING), "tokens_up": lambda: tokens_up(base, None, chosen, adapters, y)}
    lists = sorting.sort_tokens(x, None, adapters, ROUTING)
    parts = sorting.sorted_down(x, lists, adapters, 2)

    def down(tile: sorting.DownTile) -> None:
        before, sorting.DOWN = sorting.DOWN, tile
        sorting.sorted_down(x, lists, adapters, 2)
        sorting.DOWN = before

    def up(tile: sorting.UpTile) -> None:
        before, sorting.UP = sorting.UP, tile
        for slot in (0, 1):
            sorting.sorted_up(slot, None, None, parts, lists, adapters, y)
        sorting.UP = before

    for each in DOWNS:
        works[f"down{tuple(each)}".replace(" ", "")] = lambda each=each: down(each)
    for tile in UPS:
        works[f"up{tuple(tile)}".replace(" ", "")] = lambda tile=tile: up(tile)
    return works


def old(group: Group, x: torch.Tensor) -> torch.Tensor:
    """The path for products with all rows."""
    table = plan.table_of(x.device)
    rows = tuple(row for row in table.group if row.path != "many_adapters")
    if rows != table.group:
        plan.use(x.device, Table("all rows", rows, table.layer))
    return run_group(x, group.fused, ROUTING)


def always_sorted(arguments: tuple[object, ...]) -> torch.Tensor:
    before, sorting.FEW_ROWS = sorting.FEW_ROWS, 0
    try:
        return sorted_forward(*arguments)
    finally:
        sorting.FEW_ROWS = before


def ways_of(group: Group, x: torch.Tensor) -> dict[str, Work]:
    arguments = (x, group.packed[: group.outputs], None, group.fused.adapters, ROUTING)
    ways: dict[str, Work] = {"WAY sorted": lambda: sorted_forward(*arguments), "WAY always sorted": lambda: always_sorted(arguments)}
    if len(x) <= 256:
        for pieces in (1, 2, 4):
            ways[f"WAY few {pieces}"] = lambda pieces=pieces: few_forward(*arguments, pieces)
    if group.adapters <= 128:
        ways["WAY all rows"] = lambda: old(group, x)
    return ways


def warm(name: str, sizes: list[str]) -> None:
    for size in sizes:
        adapters, tokens = map(int, size.split("x"))
        group = Group(name, adapters, 8)
        for kind, pool in (("", 0), (" local", 16)):
            x = group.input(tokens, pool)
            for key, work in ways_of(group, x).items():
                try:
                    y = work()
                    print(name, size, key, kind, check(group, x, y), "" if torch.equal(work(), y) else "NOT EQUAL", flush=True)
                except Exception:
                    print(name, size, key, traceback.format_exc()[-700:], flush=True)
            for key, work in works_of(group, x, kind).items() if tokens in STEPS and not kind else ():
                try:
                    work()
                    torch.cuda.synchronize()
                except Exception:
                    print(name, size, key, traceback.format_exc()[-500:], flush=True)
        del group
        torch.cuda.empty_cache()


def main(sizes: list[str]) -> None:
    totals: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        count, tokens = map(int, size.split("x"))
        for name in SHAPES:
            groups = [Group(name, count, 8) for _ in range(COPIES[name])]
            works: dict[str, Work] = {}
            for kind, pool in (("", 0), (" local", 16)):
                pairs = [(group, group.input(tokens, pool)) for group in groups]
                if not pool:
                    works["base"] = capture(lambda pairs=pairs: [group.base(x) for group, x in pairs])
                every = [ways_of(group, x) | (works_of(group, x, kind) if tokens in STEPS else {}) for group, x in pairs]
                for key in every[0]:
                    try:
                        works[key + kind] = capture(lambda every=every, key=key: [each[key]() for each in every])
                    except Exception as problem:
                        print(name, size, key, str(problem)[:200], flush=True)
            for key, value in times(works, 7).items():
                totals.setdefault(size, {}).setdefault(key, []).append(value / len(groups))
            graphs.clear()
            del groups, works, every, pairs
            torch.cuda.empty_cache()
        mine = totals[size]
        for key, values in mine.items():
            ratio = f" ({sum(values) / sum(mine['base']):.3f})" if key.startswith("WAY") else ""
            print(f"{size} {key}: {sum(values):.1f}{ratio}   {' '.join(f'{value:.1f}' for value in values)}", flush=True)
        (Path(os.environ.get("OUT", ".")) / "variants.json").write_text(json.dumps(totals, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            warm(sys.argv[2], sys.argv[3:])
        else:
            main(sys.argv[2:])
