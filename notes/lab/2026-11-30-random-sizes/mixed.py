"""28 adapters of ranks 2 to 64 against 28 adapters of rank 22, which is the same total: the four fused groups of a layer of Llama-3-8B, in CUDA graphs.

`mixed.py TOKENS...` prints microseconds and their ratio, and writes mixed.json to $OUT.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import torch

from meteora_core.bench import SHAPES
from meteora_core.bench.timing import capture, medians
from meteora_kernels import Adapters, Group, Routing, run_group
from meteora_kernels.group import reads_in_place, row_for
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.wide import Wide

RANKS = {"mixed": [2] * 4 + [4] * 6 + [8] * 5 + [16] * 4 + [32] * 3 + [64] * 6, "uniform": [22] * 28}


def group_of(ranks: list[int], hidden: int, widths: tuple[int, ...]) -> Group:
    """A group with random weights, B^T in its rows."""
    count, rank, outputs = len(ranks), sum(ranks), sum(widths)
    device, like = torch.device("cuda"), torch.empty(0, dtype=torch.bfloat16, device="cuda")
    stacked, begin = stacked_rows_of(count, rank), gate_rows_of(count)
    wide = Wide(hidden, rank, len(widths))
    rows, has_up = -(-(outputs + len(widths) * stacked) // 128) * 128, wide.pays(torch.bfloat16)
    packed = wide.new_block(rows, like) if has_up else like.new_zeros(rows, hidden)
    for start, size in [(0, outputs)] + [(outputs + i * stacked + at, n) for i in range(len(widths)) for at, n in ((0, count), (begin, rank))]:
        packed[start : start + size].normal_(std=hidden**-0.5)
    up = torch.empty(rank * outputs, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    if has_up:
        wide.place_up(packed, up, list(widths))
    offsets = torch.tensor([0, *itertools.accumulate(ranks)], device=device)
    return Group.of(packed, Adapters.of_group(packed, up, torch.ones(count, device=device), offsets, widths, max(ranks)), has_up=has_up)


def main() -> None:
    torch.manual_seed(0)
    routing, found = Routing(2), {}
    copies = 4
    sets = {name: [[group_of(ranks, hidden, widths) for hidden, widths in SHAPES["llama3-8b"].groups] for _ in range(copies)] for name, ranks in RANKS.items()}
    for tokens in map(int, sys.argv[1:] or ["1", "8", "64", "512", "4096"]):
        works, kept = {}, []
        for name, groups in sets.items():
            inputs = []
            kept.append(inputs)  # the graphs read them
            for group in groups[0]:
                x = torch.randn(tokens, group.packed.shape[1], device="cuda").bfloat16()
                here = reads_in_place(group, tokens, 2)
                inputs.append((group.wide.new_rows(tokens, x).copy_(x), True) if here and group.wide is not None else (x, False))

            def work(groups: list[list[Group]] = groups, inputs: list[tuple[torch.Tensor, bool]] = inputs) -> None:
                for each in groups:
                    for group, (x, here) in zip(each, inputs, strict=True):
                        run_group(x, group, routing, in_place=here)

            works[name] = capture(work)
        times = {name: value / copies * 1e3 for name, value in medians(works, torch.device("cuda"), repeats=30, seconds=3.0).items()}
        paths = {name: [row_for(group, tokens, 2, aligned=tokens > 16).path for group in groups[0]] for name, groups in sets.items()}
        found[tokens] = {**times, "ratio": times["mixed"] / times["uniform"], "paths": paths}
        print(tokens, {name: round(value, 1) for name, value in times.items()}, round(times["mixed"] / times["uniform"], 3), paths["mixed"], flush=True)
        (Path(os.environ.get("OUT", ".")) / "mixed.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
