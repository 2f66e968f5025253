"""Eager calls of a whole model, fused and base: times, the processor's times, equal bits, and where the processor spends its time.

`eager.py [--seconds S] [--layers L] TOKENS...` writes eager.json to $OUT after every number of tokens.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from meteora_core import attach, fuse
from meteora_core.bench import SHAPES
from meteora_core.bench.end_to_end import random_bank, random_model

DEVICE = torch.device("cuda")
Work = Callable[[], Tensor]


def call(model: nn.Module, ids: Tensor) -> Work:
    def run() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1).logits

    return run


def in_turn(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Medians in milliseconds between events, and of the processor's time, with the works in changing order; the first two rounds warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for index in range(rounds + 2):
        for name in sorted(works, reverse=bool(index % 2)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            start.record()
            works[name]()
            spent = (time.perf_counter() - begin) * 1e3
            end.record()
            torch.cuda.synchronize()
            if index >= 2:
                taken[name].append((start.elapsed_time(end), spent))
    found = {}
    for name, pairs in taken.items():
        for place, what in enumerate(("", "_processor")):
            found[name + what] = sorted(pair[place] for pair in pairs)[len(pairs) // 2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("tokens", type=int, nargs="*", default=[512, 1, 8, 64, 256, 1024, 2048])
    given = parser.parse_args()
    began, file, report = time.perf_counter(), Path(os.environ.get("OUT", ".")) / "eager.json", dict[str, object]()
    torch.manual_seed(0)
    models = {name: random_model(SHAPES["llama3-8b"], given.layers, torch.bfloat16, DEVICE) for name in ("base", "fused")}
    attach(models["fused"], random_bank(models["fused"], 28, 8, torch.bfloat16), top_k=2)
    texts = {count: torch.randint(0, 32000, (1, count), device=DEVICE) for count in given.tokens}
    apart = {count: call(models["fused"], ids)().float() for count, ids in texts.items()}
    fuse(models["fused"])
    for count, ids in texts.items():
        if time.perf_counter() - began > given.seconds:
            print("no time left", flush=True)
            break
        works = {name: call(model, ids) for name, model in models.items()}
        first, second = works["fused"](), works["fused"]()  # the first launch of a size goes through Triton, the second does not
        found: dict[str, object] = {"equal_bits": torch.equal(first, second)}
        found["difference_to_the_layers_apart"] = float((first.float() - apart[count]).norm() / apart[count].norm())
        times = in_turn(works, 30)
        ratios = {f"ratio{what}": times[f"fused{what}"] / times[f"base{what}"] for what in ("", "_processor")}
        report[str(count)] = {**found, **times, **ratios}
        file.write_text(json.dumps(report, indent=1))
        print(count, json.dumps(report[str(count)]), flush=True)
    profile, run, text = cProfile.Profile(), call(models["fused"], texts[given.tokens[0]]), io.StringIO()
    run()
    profile.enable()
    for _ in range(3):
        run()
    profile.disable()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(30)
    print(text.getvalue(), flush=True)


if __name__ == "__main__":
    main()
