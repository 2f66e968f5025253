"""`many_adapters`, step by step and as a whole, each group alone, weights not in the cache.

`steps.py check GROUP TOKENS...` compiles and checks against float64 (several at a time); `steps.py time TOKENS...` times.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import torch
from common import SHAPES, Group, capture, check, graphs, times

from meteora_kernels import Adapters, Routing, many_adapters, plan, run_group
from meteora_kernels.many_adapters import base_product, few_forward, sorted_forward
from meteora_kernels.many_adapters.launch import blocks_down, blocks_up, gate_sums, sort_tokens, tokens_down, tokens_up
from meteora_kernels.plan.table import Table

ADAPTERS, RANK = int(os.environ.get("ADAPTERS", "256")), int(os.environ.get("RANK", "8"))
MOST_FEW, LEAST_SORTED = 256, 128
ROUTING = Routing(2, 1.0)


def adapters_of(group: Group) -> Adapters:
    return group.fused.adapters


def old(group: Group, x: torch.Tensor) -> torch.Tensor:
    table = plan.table_of(x.device)
    rows = tuple(row for row in table.group if row.path != "many_adapters")
    if rows != table.group:
        plan.use(x.device, Table("all rows", rows, table.layer))
    return run_group(x, group.fused, ROUTING)


def steps_of(group: Group, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    adapters, weights = adapters_of(group), group.packed[: group.outputs]
    logits = gate_sums(x, adapters)
    y = torch.empty(len(x), group.outputs, dtype=x.dtype, device="cuda")
    base = base_product(x, weights)
    steps: dict[str, Callable[[], object]] = {"gates": lambda: gate_sums(x, adapters), "product": lambda: base_product(x, weights)}
    if len(x) <= MOST_FEW:
        chosen = tokens_down(x, logits, adapters, ROUTING)
        steps |= {"tdown": lambda: tokens_down(x, logits, adapters, ROUTING), "tup": lambda: tokens_up(base, None, chosen, adapters, y)}
    if len(x) >= LEAST_SORTED:
        found = sort_tokens(logits.view(len(logits), len(x), adapters.members, -1), adapters, ROUTING)
        middle = blocks_down(x, found, adapters)

        steps |= {
            "sort": lambda: sort_tokens(logits.view(len(logits), len(x), adapters.members, -1), adapters, ROUTING),
            "bdown": lambda: blocks_down(x, found, adapters),
            "bup": lambda: blocks_up(base, None, middle, found, adapters, y),
        }
    return steps


def main() -> None:
    mode, *rest = sys.argv[1:]
    names = [rest.pop(0)] if mode == "check" else list(SHAPES)
    totals: dict[tuple[int, str], float] = {}
    for name in names:
        groups = [Group(name, ADAPTERS, RANK) for _ in range(1 if mode == "check" else {"qkv": 4, "o": 5, "gu": 1, "down": 2}[name])]
        for tokens in map(int, rest):
            ways = {}
            if 16 < tokens <= MOST_FEW:
                ways["few"] = few_forward
            if tokens >= LEAST_SORTED:
                ways["sorted"] = sorted_forward
            if mode == "check":
                for kind, pool in (("uniform", 0), ("local", 16)):
                    x = groups[0].input(tokens, pool)
                    for way, forward in ways.items():
                        try:
                            call = lambda forward=forward, x=x: forward(x, groups[0].packed[: groups[0].outputs], None, adapters_of(groups[0]), ROUTING)
                            y = call()
                            again = all(torch.equal(call(), y) for _ in range(3))
                            print(name, tokens, kind, way, check(groups[0], x, y), "" if again else "NOT EQUAL", flush=True)
                        except Exception:
                            print(name, tokens, way, traceback.format_exc()[-600:], flush=True)
                continue
            works: dict[str, Callable[[], object]] = {}
            for kind, pool in (("", 0), ("16", 16)):
                inputs = [group.input(tokens, pool) for group in groups]
                pairs = list(zip(groups, inputs, strict=True))
                if not pool:
                    works["base"] = capture(lambda pairs=pairs: [group.base(x) for group, x in pairs])
                for way, forward in ways.items():
                    call = lambda pairs=pairs, forward=forward: [forward(x, g.packed[: g.outputs], None, adapters_of(g), ROUTING) for g, x in pairs]
                    works[way + kind] = capture(call)
                    if not pool and way == "few":
                        plain, many_adapters.on_second_stream = many_adapters.on_second_stream, ALONE
                        works[way + "-one-stream"] = capture(call)
                        many_adapters.on_second_stream = plain
                if "OLD" in os.environ or tokens <= 16:
                    works["old" + kind] = capture(lambda pairs=pairs: [old(group, x) for group, x in pairs])
                every = [steps_of(group, x) for group, x in pairs] if "STEPS" in os.environ else [{}]
                for step in every[0]:
                    works[f".{step}{kind}"] = capture(lambda every=every, step=step: [steps[step]() for steps in every])
            found = {key: value / len(groups) for key, value in times(works, 15).items()}
            graphs.clear()
            for key, value in found.items():
                totals[tokens, key] = totals.get((tokens, key), 0.0) + value
            if "STEPS" in os.environ:
                print(name, tokens, " ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True)
    for tokens in map(int, rest):
        if mode == "time":
            mine = {key: value for (count, key), value in totals.items() if count == tokens}
            print(f"{ADAPTERS} x {RANK}", tokens, " ".join(f"{key} {value:.0f}" + ("" if key[0] == "." else f" ({value / mine['base']:.3f})") for key, value in mine.items()))


class ALONE:
    """:func:`many_adapters.on_second_stream` that stays on the current stream."""

    def __init__(self, x: torch.Tensor) -> None:
        pass

    def __enter__(self) -> Callable[[], None]:
        return lambda: None

    def __exit__(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with torch.no_grad():
        main()
