"""Adapters on top of a base that somebody else multiplies: the seven linears of a layer of Llama-3-8B, each by itself, in CUDA graphs.

`over.py [TOKENS...]` times three bases: bfloat16 (`F.linear`); 8-bit floating point with a scale for each row of the weight and a constant scale of the
input (a cast and `torch._scaled_mm`); and 8-bit integers (a conversion to bfloat16 and `F.linear`). On each: nothing, 28 adapters of rank 8 before the base
product on the same stream, and at the same time on a second stream. Prints microseconds and ratios to the base alone; writes over.json to $OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench import SHAPES, Setting
from meteora_core.bench.contenders import make_layer
from meteora_core.bench.timing import capture, medians
from meteora_kernels import Adapters, Routing, layer

DEVICE, DTYPE, COPIES = torch.device("cuda"), torch.bfloat16, 3
Product = Callable[[Tensor], Tensor]


def bfloat16(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def float8(weight: Tensor) -> Product:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    held = (weight.float() / scale).to(torch.float8_e4m3fn)
    scales, one = scale.t().contiguous(), torch.full((1, 1), 5 / 448, device=DEVICE)

    def product(x: Tensor) -> Tensor:
        small = (x * (448 / 5)).to(torch.float8_e4m3fn)
        return torch._scaled_mm(small, held.t(), one.expand(len(x), 1).contiguous(), scales, out_dtype=DTYPE, use_fast_accum=True)

    return product


def int8(weight: Tensor) -> Product:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(DTYPE)
    held = (weight / scale).round().to(torch.int8)
    return lambda x: F.linear(x, held.to(DTYPE)) * scale.view(1, -1)


@contextmanager
def one_stream(x: Tensor) -> Any:
    yield lambda: None


def main() -> None:
    torch.manual_seed(0)
    two, setting, found = layer.on_second_stream, Setting(28, 8, 2), {}
    sets = [make_layer(SHAPES["llama3-8b"], setting, DTYPE, DEVICE, fused=False) for _ in range(COPIES)]
    for tokens in map(int, sys.argv[1:] or ["1", "8", "64"]):
        for kind in (bfloat16, float8, int8):
            works = {}
            calls = []
            for groups in sets:
                for group in groups:
                    x = torch.randn(tokens, group.hidden, device=DEVICE).to(DTYPE)
                    for each in group.linears:
                        adapters = Adapters.of_layer(each.gate, each.lora_A, each.lora_B, each.scaling, each.offsets, setting.rank)
                        calls.append((x, kind(each.weight), adapters))

            def alone(calls: list[Any] = calls) -> None:
                for x, product, _ in calls:
                    product(x)

            def over(calls: list[Any] = calls) -> None:
                for x, product, adapters in calls:
                    layer.mix_over(x, product, adapters, Routing(2))

            try:
                with torch.inference_mode():
                    works["alone"] = capture(alone)
                    layer.on_second_stream = one_stream
                    works["one stream"] = capture(over)
                    layer.on_second_stream = two
                    works["two streams"] = capture(over)
                    times = {name: value / COPIES * 1e3 for name, value in medians(works, DEVICE, repeats=30, seconds=2.0).items()}
            except Exception as problem:
                layer.on_second_stream = two
                print(tokens, kind.__name__, f"{type(problem).__name__}: {str(problem)[:200]}", flush=True)
                continue
            ratios = {name: round(value / times["alone"], 3) for name, value in times.items()}
            found[f"{tokens} {kind.__name__}"] = times
            print(tokens, kind.__name__, {name: round(value, 1) for name, value in times.items()}, ratios, flush=True)
            (Path(os.environ.get("OUT", ".")) / "over.json").write_text(json.dumps(found, indent=1))
            del works, calls
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
