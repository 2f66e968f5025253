"""60 random sizes: the path that the table chooses, other paths, and the `dense` backend, for single layers and for fused groups of one linear.

`sizes.py [--seconds S] [--jobs J] [--count C] [--taken] [--layer] [--compile] [--first NAME...]` first compiles all kernels in J processes, then times one size after the other in
CUDA graphs and writes sizes.json to $OUT. With --taken, only the path of the table is compared with `dense`, with --layer only for single layers; sizes whose names begin with NAME come first.
Needs tests/ on the path, for the sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from support.random_sizes import Sizes, draw

from meteora_core.bench.timing import capture, medians
from meteora_core.bench.tuning import candidates, configuration, described
from meteora_kernels import Adapters, Group, Routing, layer, many_adapters, mix, plan
from meteora_kernels import group as groups
from meteora_kernels.plan import Case, Facts, Row
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of

DTYPE = torch.bfloat16
Work = Callable[[], object]
OTHERS = [Row("library"), Row("many_tokens"), Row("many_tokens", inline=True)]
MANY = [Row("many_adapters", way=way) for way in ("few", "sorted_down", "sorted")]
TABLE = "ALL_ROWS" in os.environ
"""Whether all rows of the table are timed."""
LAYER = "--layer" in sys.argv  # also in the processes that compile
GROUPS = [Row("split"), Row("split", pieces=1), Row("packed"), Row("packed", pieces=1)]


def sizes_of(count: int, first: tuple[str, ...]) -> list[Sizes]:
    return sorted(draw(count), key=lambda size: not size.name.startswith(first))


def works_of(size: Sizes, only_taken: bool) -> dict[str, Work]:
    """All ways to compute one layer of this size, or only the table's and `dense`."""
    device, generator = torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(DTYPE)

    count, rank = len(size.ranks), sum(size.ranks)
    begin, stacked = gate_rows_of(count), stacked_rows_of(count, rank)
    packed = random(-(-(size.width + stacked) // 128) * 128, size.hidden, scale=size.hidden**-0.5)
    up, scaling = random(rank * size.width, scale=0.1), torch.ones(count, device=device)
    offsets = torch.tensor([0, *itertools.accumulate(size.ranks)], device=device)
    group = Group.of(packed, Adapters.of_group(packed, up, scaling, offsets, (size.width,), max(size.ranks)))
    weight, gate = packed[: size.width], packed[size.width : size.width + count]
    lora_A, lora_B = packed[size.width + begin : size.width + begin + rank], up.view(rank, size.width)
    adapters, routing = Adapters.of_layer(gate, lora_A, lora_B, scaling, offsets, max(size.ranks)), Routing(size.top_k)
    x = random(size.tokens, size.hidden)
    base = F.linear(x, weight)
    facts = Facts(size.hidden, (size.width,), count, rank, max(size.ranks), DTYPE, device)
    case = Case(facts, size.tokens, size.top_k)
    table = plan.table_of(device)
    works: dict[str, Work] = {"layer dense": lambda: mix(x, base, adapters, routing, backend="dense")}
    taken = layer.row_for(x, adapters, size.top_k)
    works["layer taken: " + described(taken)] = lambda: layer.run(taken, x, None, base, adapters, routing)
    others = [] if only_taken else [*OTHERS, *MANY, *(table.layer if TABLE else ())]
    for row, reason in candidates(others, case, layer.CAN_RUN):
        if not reason and row != configuration(taken):
            works["layer " + described(row)] = lambda row=row: layer.run(row, x, None, base, adapters, routing)
    if LAYER:
        return works
    works["group dense"] = lambda: mix(x, F.linear(x, weight), adapters, routing, backend="dense")
    first = groups.row_for(group, size.tokens, size.top_k, aligned=size.tokens > 16 and group.aligned)
    works["group taken: " + described(first)] = lambda: groups.run_group(x, group, routing)
    for row in [] if only_taken else [*GROUPS, *(row for row in MANY if not many_adapters.can_run(case, row))]:
        works["group " + described(row)] = lambda row=row: groups.PATHS[row.path].run(x, group, routing, row)
    return works


def compile_part(index: int, jobs: int, sizes: list[Sizes], only_taken: bool) -> None:
    for size in sizes[index::jobs]:
        for name, work in works_of(size, only_taken).items():
            try:
                work()
                torch.cuda.synchronize()
            except Exception as problem:
                print(f"{size.name} {name}: {str(problem)[:150]}", flush=True)
        torch.cuda.empty_cache()


def measure(size: Sizes, only_taken: bool) -> dict[str, float]:
    ready: dict[str, Work] = {}
    for name, work in works_of(size, only_taken).items():
        try:
            ready[name] = capture(work)
        except Exception:
            torch.cuda.synchronize()
    return medians(ready, torch.device("cuda"), repeats=15, seconds=0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--taken", action="store_true", help="only the table's path and dense")
    parser.add_argument("--layer", action="store_true", help="only single layers, not fused groups")
    parser.add_argument("--first", nargs="*", default=[])
    parser.add_argument("--compile", action="store_true", help="only compile")
    given = parser.parse_args()
    sizes = sizes_of(given.count, tuple(given.first))
    began, out = time.perf_counter(), Path(os.environ.get("OUT", ".")) / "sizes.json"
    context = multiprocessing.get_context("spawn")
    parts = [context.Process(target=compile_part, args=(index, given.jobs, sizes, given.taken)) for index in range(given.jobs)]
    for part in parts:
        part.start()
    for part in parts:
        part.join(max(1.0, 0.6 * given.seconds - (time.perf_counter() - began)))
        if part.is_alive():
            part.terminate()
    print(f"compiled: {time.perf_counter() - began:.0f} s", flush=True)
    if given.compile:
        return
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        if time.perf_counter() - began > given.seconds:
            break
        with torch.inference_mode():
            found[size.name] = times = measure(size, given.taken)
        for kind in ("layer",) if LAYER else ("layer", "group"):
            taken = next((name for name in times if name.startswith(f"{kind} taken")), "")
            dense = times.get(f"{kind} dense", 0.0)
            best = min((name for name in times if name.startswith(kind)), key=lambda name: times[name], default="")
            if not taken or not dense or times[taken] > 1.02 * dense or times[taken] > 1.15 * times[best]:
                figures = f"{times.get(taken, 0) * 1e3:.0f} us, dense {dense * 1e3:.0f}, best {best} {times.get(best, 0) * 1e3:.0f}"
                print(f"{size.name} R={sum(size.ranks)} {taken} {figures}", flush=True)
        out.write_text(json.dumps(found, indent=1))
        torch.cuda.empty_cache()
    shares = sorted((min(time for name, time in times.items() if "taken" in name) / times["layer dense"], name) for name, times in found.items() if LAYER and len(times) == 2)
    print("ratio to dense, the largest:", *(f"{name} {share:.3f}" for share, name in shares[:-6:-1]), *(f"median {shares[len(shares) // 2][0]:.3f}" for _ in shares[:1]), flush=True)
    print(f"{len(found)} sizes, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
