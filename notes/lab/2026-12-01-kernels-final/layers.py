"""The seven linears of a layer of Llama-3-8B, base, one LoRA as PEFT computes it and fused groups, all in one run and in CUDA graphs.

`layers.py warm SET...` compiles every size and checks it against float64 and a second run; `layers.py time SECONDS SET...` times until SECONDS have passed. The
sets are 28x8, 256x8 and 1024x8 (adapters x rank, top-2), each with its numbers of tokens. Routes are uniform and local (runs of 8 tokens share two of 16
adapters). For 256x8 at 64 tokens, the same without the table's rows for `chosen_adapters` is timed too; with tokens-in-order.patch, also variants of B at 512
and 4,096. Prints ratios to the base (F.linear for each linear),
and appends microseconds to layers.jsonl in $OUT. Without a GPU it runs a tiny shape in Triton's interpreter, without times that mean anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from meteora_core.bench import SHAPES, ModelShape, Setting
from meteora_core.bench.contenders import Linears, lay_input, local_input, make_layer, run_group
from meteora_core.bench.layers import _error as error_of
from meteora_core.bench.timing import capture as capture_on_gpu
from meteora_core.bench.timing import medians
from meteora_kernels import plan
from meteora_kernels.group import row_for
from meteora_kernels.many_adapters import launch
from meteora_kernels.plan import Row

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float16
SHAPE = SHAPES["llama3-8b"] if GPU else ModelShape("tiny", 64, 32, 96, 4, 2, 1, 100)
SETS = {
    "28x8": (Setting(28, 8, 2), (1, 8, 64, 512, 4096)),
    "256x8": (Setting(256, 8, 2), (64, 512, 8, 4096, 32, 1)),
    "1024x8": (Setting(1024, 8, 2), (8, 1, 64)),
} if GPU else {"28x8": (Setting(5, 2, 2), (1, 5)), "256x8": (Setting(40, 2, 2), (3, 20))}
COPIES = 3 if GPU else 1
"""Layers with weights of their own in one graph, so that none finds its weights in the cache and the start of a graph counts for a third."""
Work = Callable[[], object]


def capture(work: Work) -> Work:
    return capture_on_gpu(work) if GPU else work


def inputs_of(groups: list[Linears], plain: dict[int, Tensor], setting: Setting, kind: str) -> list[Tensor]:
    return [local_input(group, plain[group.hidden], setting) if kind == "local" else plain[group.hidden] for group in groups]


def works_of(name: str, sets: list[list[Linears]], inputs: list[list[Tensor]], setting: Setting) -> Work:
    jobs = []
    for groups, given in zip(sets, inputs, strict=True):
        for group, x in zip(groups, given, strict=True):
            jobs.append((group, lay_input(group, x, setting.top_k) if name == "fused" else x))

    def work() -> None:
        with torch.no_grad():
            for group, x in jobs:
                run_group(name, group, x, setting)

    return work


def paths_of(groups: list[Linears], tokens: int, top_k: int) -> list[str]:
    found = []
    for each in groups:
        assert each.group is not None
        in_place = each.fed and each.group.wide is not None and row_for(each.group, tokens, top_k, in_place=True).path == "wide"
        row = row_for(each.group, tokens, top_k, in_place=in_place, aligned=tokens > 1)
        found.append(f"{row.path} {row.way}".strip())
    return found


@contextmanager
def without_chosen_adapters() -> Iterator[None]:
    table = plan.table_of(DEVICE)
    before = plan.use(DEVICE, replace(table, group=tuple(row for row in table.group if row.path != "chosen_adapters")))
    try:
        yield
    finally:
        plan.use(DEVICE, before)


@contextmanager
def ordered(tile: tuple[int, int, int], way: str = "") -> Iterator[None]:
    """Tokens with the same first adapter share programs that add B; with ``way``, all groups take it."""
    before, launch.ORDERED, launch.ROUTED_UP, table = (launch.ORDERED, launch.ROUTED_UP), True, tile, plan.table_of(DEVICE)
    if way:
        plan.use(DEVICE, replace(table, group=(Row("many_adapters", way=way), *table.group)))
    try:
        yield
    finally:
        launch.ORDERED, launch.ROUTED_UP = before
        plan.use(DEVICE, table)


ORDERS = {(f"in order {tile[0]} x {tile[1]}, {tile[2]} warps{' everywhere' if way else ''}"): (tile, way) for tile in ((4, 256, 4), (8, 256, 8), (8, 256, 4)) for way in ("", "sorted_down")}
"""Variants of B at 512 and 4,096 tokens of 256x8; the ways everywhere only at 4,096."""


def orders_of(name: str, tokens: int) -> dict[str, tuple[tuple[int, int, int], str]]:
    if name != "256x8" or tokens not in (20, 512, 4096) or not hasattr(launch, "ORDERED"):
        return {}
    return {key: value for key, value in ORDERS.items() if tokens != 512 or not value[1]}


def warm(names: list[str]) -> None:
    for name in names:
        setting, sizes = SETS[name]
        groups = make_layer(SHAPE, setting, DTYPE, DEVICE, fused=True)
        for tokens in sizes:
            plain = {hidden: torch.randn(tokens, hidden, device=DEVICE).to(DTYPE) for hidden, _ in SHAPE.groups}
            for kind in ("uniform", "local"):
                given = inputs_of(groups, plain, setting, kind)
                own, worst = error_of("base", groups, given, setting), error_of("fused", groups, given, setting)
                flaws = []
                for group, x in zip(groups, given, strict=True):
                    laid = lay_input(group, x, setting.top_k)
                    one, two = (run_group("fused", group, laid, setting) for _ in range(2))
                    if not all(torch.equal(left, right) for left, right in zip(one, two, strict=True)):
                        flaws.append(f"{len(group.linears)} from {group.hidden} NOT EQUAL")
                print(f"{name} {tokens} {kind}: err {worst * 1e3:.2f} (base {own * 1e3:.2f})", *flaws, paths_of(groups, tokens, setting.top_k), flush=True)
                if (name, tokens) == ("256x8", 64):
                    with without_chosen_adapters():
                        works_of("fused", [groups], [given], setting)()
                for key, (tile, way) in orders_of(name, tokens).items():
                    with ordered(tile, way):
                        print(f"{name} {tokens} {kind} {key}: err {error_of('fused', groups, given, setting) * 1e3:.2f}", flush=True)
        del groups


def timed(seconds: float, names: list[str]) -> None:
    end, file = time.monotonic() + seconds, Path(os.environ.get("OUT", ".")) / "layers.jsonl"
    for name in names:
        setting, sizes = SETS[name]
        sets = [make_layer(SHAPE, setting, DTYPE, DEVICE, fused=True) for _ in range(COPIES)]
        for tokens in sizes:
            if time.monotonic() > end:
                print(f"{name} {tokens}: no time left", flush=True)
                return
            plain = {hidden: torch.randn(tokens, hidden, device=DEVICE).to(DTYPE) for hidden, _ in SHAPE.groups}
            uniform = [inputs_of(groups, plain, setting, "uniform") for groups in sets]
            local = [inputs_of(groups, plain, setting, "local") for groups in sets]
            eager = {"base": works_of("base", sets, uniform, setting), "one LoRA": works_of("peft", sets, uniform, setting)}
            eager |= {"uniform": works_of("fused", sets, uniform, setting), "local": works_of("fused", sets, local, setting)}
            works = {key: capture(work) for key, work in eager.items()}
            if (name, tokens) == ("256x8", 64):
                with without_chosen_adapters():
                    works |= {f"{key}, token by token": capture(eager[key]) for key in ("uniform", "local")}
            for key, (tile, way) in orders_of(name, tokens).items():
                with ordered(tile, way):
                    works |= {f"{kind}, {key}": capture(eager[kind]) for kind in ("uniform", "local")}
            found = {key: value / COPIES * 1e3 for key, value in medians(works, DEVICE, repeats=60, seconds=1.5).items()}
            base = found["base"]
            ratios = "; ".join(f"{key} {value / base:.3f}" for key, value in found.items() if key != "base")
            print(f"LAYER {name} {tokens} tokens: base {base:.1f} us; {ratios}", flush=True)
            with file.open("a") as out:
                out.write(json.dumps({"set": name, "tokens": tokens, "us": found, "paths": paths_of(sets[0], tokens, setting.top_k)}) + "\n")
            del works, eager
        del sets
        if GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "warm":
        with torch.no_grad():
            warm(sys.argv[2:])
    else:
        timed(float(sys.argv[2]), sys.argv[3:])
