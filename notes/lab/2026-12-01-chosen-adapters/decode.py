"""Decoding with the chosen rows: places by slot or by the chosen ranks, the four groups of a layer of Llama-3-8B, in CUDA graphs.

`decode.py warm NAME` compiles and checks a set of adapters against float64 and a second run; `decode.py time SECONDS` times all sets until SECONDS have passed.
The sets: 28 adapters of ranks 2 to 64 (616 rows), 28 of rank 22, and 28, 256 and 1,024 of rank 8, the last three with both kinds of places. Needs the folder
2026-11-30-random-sizes on the path. Prints microseconds for a layer, and appends them to decode.jsonl in $OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mixed import RANKS, group_of

from meteora_core.bench import SHAPES
from meteora_core.bench.timing import capture, medians
from meteora_kernels import Group, Routing
from meteora_kernels.group import PATHS, decode_chosen_rows, row_for
from meteora_kernels.plan import Case, table_of

SETS = {**RANKS, "28x8": [8] * 28, "256x8": [8] * 256, "1024x8": [8] * 1024}
TOKENS = {"mixed": (1, 8), "uniform": (1, 8), "28x8": (1, 4), "256x8": (1, 8), "1024x8": (8,)}
UPS = ((64, 2), (64, 1), (64, 3), (32, 3), (128, 2))
GROUPS = SHAPES["llama3-8b"].groups
Work = Callable[[], Any]


def row_of(group: Group, tokens: int) -> Any:
    """The first row of the table for this path, whether or not another path comes before it."""
    rows = [row for row in table_of(group.facts.device).group if row.path == "decode_chosen_rows" and row.fits(Case(group.facts, tokens, 2))]
    return rows[0] if rows else row_for(group, tokens, 2)


def with_form(work: Work, up: tuple[int, int], by_slot: bool | None) -> Any:
    """With another tile for B, and with the places by slot (True), by ranks (False), or as the path chooses."""
    before, fill = decode_chosen_rows.UP_TILE, decode_chosen_rows.fill_places
    decode_chosen_rows.UP_TILE = up
    if by_slot is not None:
        decode_chosen_rows.fill_places = lambda adapters: by_slot
    try:
        return work()
    finally:
        decode_chosen_rows.UP_TILE, decode_chosen_rows.fill_places = before, fill


def forms_of(name: str) -> dict[str, tuple[tuple[int, int], bool | None]]:
    if name in ("mixed", "uniform"):
        return {"by slot": (UPS[0], True)} | {f"by ranks, {up}": (up, False) for up in UPS}
    return {"by slot": (UPS[0], True), "by ranks": (UPS[0], False)}


def exact(group: Group, x: torch.Tensor, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some output columns, and in float64 what the base and the whole give there."""
    adapters, wide, start, places, bases, wholes = group.adapters, x.double(), 0, [], [], []
    offsets, total = adapters.offsets.tolist(), group.total_rank
    for member, width in enumerate(adapters.widths):
        place = torch.randperm(width, generator=torch.Generator().manual_seed(3))[:columns].cuda()
        first = sum(adapters.widths) + member * adapters.member_rows
        best = (wide @ group.packed[first : first + adapters.number].double().t()).topk(2, dim=1)
        base = wide @ group.packed[start + place].double().t()
        whole = base.clone()
        up = adapters.lora_B[total * start : total * (start + width)].view(total, width)[:, place].double()
        down = wide @ group.packed[first + group.gate_rows : first + group.gate_rows + total].double().t()
        for token in range(len(x)):
            for share, pick in zip(best.values[token].softmax(0), best.indices[token].tolist(), strict=True):
                own = slice(offsets[pick], offsets[pick + 1])
                whole[token] += share * (down[token, own] @ up[own])
        places.append(place + start)
        bases.append(base)
        wholes.append(whole)
        start += width
    return torch.cat(places), torch.cat(bases, 1), torch.cat(wholes, 1)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def warm(name: str) -> None:
    for hidden, widths in GROUPS:
        group = group_of(SETS[name], hidden, widths)
        for tokens in TOKENS[name]:
            x, row = torch.randn(tokens, hidden, device="cuda").bfloat16(), row_of(group, tokens)
            places, base, whole = exact(group, x)
            own = error(F.linear(x, group.packed[places]), base)
            for key, (up, by_slot) in forms_of(name).items():
                got = with_form(lambda: PATHS[row.path].run(x, group, Routing(2), row), up, by_slot)
                again = with_form(lambda: PATHS[row.path].run(x, group, Routing(2), row), up, by_slot)
                flaw = "" if torch.equal(got, again) else " NOT EQUAL"
                print(f"{name} {widths} {tokens} {key}: worst {error(got[:, places], whole) * 1e3:.2f} (base {own * 1e3:.2f}){flaw}", flush=True)
            PATHS[(first := row_for(group, tokens, 2)).path].run(x, group, Routing(2), first)
        del group
        torch.cuda.empty_cache()
    torch.cuda.synchronize()


def main(seconds: float) -> None:
    end, copies = time.monotonic() + seconds, 3
    for name, ranks in SETS.items():
        sets = [[group_of(ranks, hidden, widths) for hidden, widths in GROUPS] for _ in range(copies if len(ranks) < 1000 else 1)]
        for tokens in TOKENS[name]:
            if time.monotonic() > end:
                print(f"{name} {tokens}: no time left", flush=True)
                return
            inputs = [torch.randn(tokens, hidden, device="cuda").bfloat16() for hidden, _ in GROUPS]

            def run(choose: Callable[[Group, int], Any], inputs: list[torch.Tensor] = inputs, sets: Any = sets) -> None:
                for groups in sets:
                    for group, x in zip(groups, inputs, strict=True):
                        row = choose(group, len(x))
                        PATHS[row.path].run(x, group, Routing(2), row)

            def base(inputs: list[torch.Tensor] = inputs, sets: Any = sets) -> None:
                for groups in sets:
                    for group, x in zip(groups, inputs, strict=True):
                        start = 0
                        for width in group.adapters.widths:
                            F.linear(x, group.packed[start : start + width])
                            start += width

            works: dict[str, Work] = {"base": capture(base), "table": capture(lambda: run(lambda group, count: row_for(group, count, 2)))}
            for key, (up, by_slot) in forms_of(name).items():
                works[key] = capture(lambda up=up, by_slot=by_slot: with_form(lambda: run(row_of), up, by_slot))
            found = {key: value / len(sets) * 1e3 for key, value in medians(works, torch.device("cuda"), repeats=15, seconds=0.8).items()}
            print(f"DECODE {name} {tokens}:", *(f"{key} {value:.1f};" for key, value in found.items()), flush=True)
            with (Path(os.environ.get("OUT", ".")) / "decode.jsonl").open("a") as file:
                file.write(json.dumps({"set": name, "tokens": tokens, "us": found}) + "\n")
            del works
        del sets
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        if sys.argv[1] == "warm":
            for given in sys.argv[2:]:
                warm(given)
        else:
            main(float(sys.argv[2]))
