"""The path `chosen_adapters` with several tiles beside the path of the table, each group of a layer of Llama-3-8B alone, weights not in the cache.

`ways.py warm GROUP SIZES...` compiles every variant and checks it against float64 and a second run; `ways.py time SECONDS SIZES...` times until SECONDS have
passed. A size is ADAPTERSxTOKENS, rank 8, top-2. Needs the folder 2026-11-29-many-adapters on the path. Prints the sum of the base over the four groups, and
every variant of every group in microseconds; appends them to ways.jsonl in $OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Group, capture, check, graphs, times

from meteora_kernels import Routing
from meteora_kernels.group import PATHS, chosen_adapters, row_for
from meteora_kernels.plan import Case, Row, Span
from meteora_kernels.tile import Tile

ROUTING = Routing(2, 1.0)
COPIES = {"gu": 1, "qkv": 3, "down": 2, "o": 5}
KINDS = (("", 0), (" local", 16))
Work = Callable[[], torch.Tensor]

FORMS: dict[int, dict[str, list[tuple[Tile, int, int]]]] = {
    32: {
        "gu": [(Tile(32, 128, 128, 4, 4), 1, 4)],
        "qkv": [(Tile(32, 64, 128, 4, 8), 1, 3)],
        "o": [(Tile(32, 64, 128, 4, 8), 1, 8)],
        "down": [(Tile(32, 64, 256, 4, 4), 1, 8)],
    },
    64: {
        "gu": [(Tile(64, 128, 128, 4, 4), 1, 4), (Tile(64, 128, 128, 4, 4), 1, 8), (Tile(64, 64, 128, 4, 6), 1, 4)],
        "qkv": [(Tile(64, 64, 128, 4, 6), 1, 3), (Tile(64, 64, 128, 4, 6), 1, 6)],
        "o": [(Tile(64, 64, 128, 4, 7), 1, 8), (Tile(64, 64, 128, 4, 7), 1, 4)],
        "down": [(Tile(64, 64, 128, 4, 7), 1, 8), (Tile(64, 64, 128, 4, 7), 1, 16), (Tile(64, 128, 128, 4, 4), 3, 16)],
    },
    128: {
        "gu": [(Tile(128, 128, 64, 8, 4), 1, 4), (Tile(128, 64, 128, 4, 4), 1, 4)],
        "qkv": [(Tile(128, 64, 128, 4, 4), 1, 3)],
        "o": [(Tile(128, 64, 128, 4, 4), 1, 8)],
        "down": [(Tile(128, 64, 128, 4, 4), 1, 8), (Tile(128, 128, 128, 8, 3), 3, 16)],
    },
}
"""For each number of tokens that a tile holds: tiles, pieces of the base, pieces of gates and A."""
FINISHES = ((32, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4))


def one_lora(group: Group) -> Callable[[torch.Tensor], object]:
    """The base with one un-merged LoRA of rank 8, as PEFT computes it."""
    like = group.packed
    downs = [torch.randn(8, group.hidden, dtype=like.dtype, device=like.device) * 0.01 for _ in group.widths]
    ups = [torch.randn(width, 8, dtype=like.dtype, device=like.device) * 0.01 for width in group.widths]
    each = list(zip(group.weights, downs, ups, strict=True))
    return lambda x: [F.linear(x, weight) + F.linear(F.linear(x, down), up) * 2.0 for weight, down, up in each]


def with_finish(finish: tuple[int, int, int, int], work: Work) -> torch.Tensor:
    before, chosen_adapters.FINISH = chosen_adapters.FINISH, finish
    try:
        return work()
    finally:
        chosen_adapters.FINISH = before


def ways_of(group: Group, x: torch.Tensor) -> dict[str, Work]:
    tokens = len(x)
    row = row_for(group.fused, tokens, 2, aligned=True)
    ways: dict[str, Work] = {f"taken: {row.path} {row.way}": lambda: PATHS[row.path].run(x, group.fused, ROUTING, row)}
    case = Case(group.fused.facts, tokens, 2, aligned=True)
    most = next((size for size in FORMS if size >= tokens), 0)
    for index, (tile, pieces, gate_pieces) in enumerate(FORMS[most][group.name] if most else ()):
        form = Row("chosen_adapters", Span(1, most), pieces=pieces, gate_pieces=gate_pieces, tile=tile)
        name = f"chosen {tile.outputs} {tile.step} {tile.stages}, {pieces} {gate_pieces}"
        reason = chosen_adapters.can_run(case, form)
        if reason:
            print(group.name, tokens, name, "CANNOT RUN", reason, flush=True)
            continue
        ways[name] = work = lambda form=form: chosen_adapters.run(x, group.fused, ROUTING, form)
        for finish in FINISHES if not index and tokens == 64 else ():
            ways[f"{name}, finish {finish}"] = lambda finish=finish, work=work: with_finish(finish, work)
    return ways


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
                except Exception as problem:
                    print(name, size, key, "FAILED", traceback.format_exc()[-400:], flush=True)
                    if "CUDA" in str(problem):
                        return
        del group
        torch.cuda.empty_cache()


def timed(seconds: float, sizes: list[str]) -> None:
    end = time.monotonic() + seconds
    for size in sizes:
        count, tokens = map(int, size.split("x"))
        found: dict[str, dict[str, float]] = {}
        for name, copies in COPIES.items():
            if time.monotonic() > end:
                print(f"{size} {name}: no time left", flush=True)
                return
            groups = [Group(name, count, 8) for _ in range(copies)]
            works: dict[str, Callable[[], object]] = {}
            for kind, pool in KINDS:
                pairs = [(group, group.input(tokens, pool)) for group in groups]
                if not pool:
                    works["base"] = capture(lambda pairs=pairs: [group.base(x) for group, x in pairs])
                    loras = [one_lora(group) for group in groups]
                    works["one LoRA"] = capture(lambda pairs=pairs, loras=loras: [lora(x) for (_, x), lora in zip(pairs, loras, strict=True)])
                every = [ways_of(group, x) for group, x in pairs]
                for key in every[0]:
                    try:
                        works[key + kind] = capture(lambda every=every, key=key: [each[key]() for each in every])
                    except Exception as problem:
                        print(name, size, key, str(problem)[:200], flush=True)
            found[name] = {key: value / copies for key, value in times(works, 9).items()}
            print(size, name, *(f"{key}: {value:.1f};" for key, value in found[name].items()), flush=True)
            graphs.clear()
            del groups, works, every, pairs, loras
            torch.cuda.empty_cache()
        with (Path(os.environ.get("OUT", ".")) / "ways.jsonl").open("a") as file:
            file.write(json.dumps({"size": size, "us": found}) + "\n")
        base = sum(values["base"] for values in found.values())
        for kind, _ in KINDS:
            taken = sum(next(value for key, value in values.items() if key.startswith("taken") and key.endswith("local") == bool(kind)) for values in found.values())
            own = [[value for key, value in values.items() if not key.startswith(("taken", "base", "one")) and key.endswith("local") == bool(kind)] for values in found.values()]
            best = sum(min(values) for values in own) if all(own) else float("nan")
            first = sum(values[0] for values in own) if all(own) else float("nan")
            lora = sum(values["one LoRA"] for values in found.values())
            print(f"SUM {size}{kind}: base {base:.0f}, LoRA {lora / base:.3f}, taken {taken / base:.3f}, first {first / base:.3f}, best {best / base:.3f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        if sys.argv[1] == "warm":
            warm(sys.argv[2], sys.argv[3:])
        else:
            timed(float(sys.argv[2]), sys.argv[3:])
