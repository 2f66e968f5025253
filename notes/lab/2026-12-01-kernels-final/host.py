"""The processor's time of the modules of a decoder layer that fuse replaces, at 512 tokens and Llama-3-8B's shapes, on a CPU and without kernels.

`host.py [--tokens T] [--rounds R] [--profile]`, with the repository's root and kernels/ on the path. Launches, torch.mm and the product with gates and A only
allocate their results, so that the times are those of Python and of PyTorch's views; the paths are those of the H200's table. Needs 1 GB. Run it with
MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1, so that memory comes from the heap, and compare two
working trees in turn.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor

import meteora_kernels.launches as launches
import meteora_kernels.steps.products as products
from meteora_core import attach, fuse
from meteora_core.bench import SHAPES
from meteora_core.bench.end_to_end import random_bank, random_model
from meteora_core.fused import feeders
from meteora_kernels import plan
from meteora_kernels.group import wide
from meteora_kernels.plan import machine
from meteora_kernels.plan.choose import shipped_for


class Kernel:
    """A kernel that does nothing."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1]) if out is None else out


def bmm_float32(left: Tensor, right: Tensor) -> Tensor:
    return torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.float32)


def without_kernels() -> None:
    stub = launches.Launcher(lambda *arguments: None, None, None, lambda device: 0)
    launches.launcher_of = lambda compiled: stub
    for name in ("group.wide", "steps.middle", "feed.rms_norm", "feed.silu_mul"):
        for value in vars(import_module(f"meteora_kernels.{name}")).values():
            if isinstance(value, launches.Launches):
                value.kernel = Kernel(value.kernel)
    plan.why_not_triton = machine.why_not_triton = lambda device, dtype: None
    wide.why_not_at_once = lambda device, programs: None
    sys.modules["meteora_kernels.plan.choose"].use(torch.device("cpu"), shipped_for("NVIDIA H200", 90)[0])
    feeders.NormFeeder.imitates = classmethod(lambda kind, module, group: isinstance(getattr(module, "weight", None), Tensor))
    feeders.GatedFeeder.imitates = classmethod(lambda kind, module, group: True)
    torch.mm = mm
    for module in (products, wide):
        if hasattr(module, "bmm_float32"):
            module.bmm_float32 = bmm_float32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(replace(SHAPES["llama3-8b"], vocabulary=64), 1, torch.bfloat16, torch.device("cpu"))
    attach(model, random_bank(model, 28, 8, torch.bfloat16), top_k=2)
    without_kernels()
    fuse(model)
    layer = model.model.layers[0]
    x, y = (torch.randn(1, given.tokens, 4096).bfloat16() for _ in range(2))
    attention, mlp = layer.self_attn, layer.mlp
    names = ("norm", "q", "k", "v", "o", "norm before the MLP", "gate", "up", "product", "down")

    def once() -> list[float]:
        times = [time.perf_counter()]

        def step(result: Tensor) -> Tensor:
            times.append(time.perf_counter())
            return result

        h = step(layer.input_layernorm(x))
        kept = [step(linear(h)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        kept.append(step(attention.o_proj(y)))
        h = step(layer.post_attention_layernorm(x))
        gate, up = step(mlp.gate_proj(h)), step(mlp.up_proj(h))
        product = step(feeders._product(gate, up, mlp.group))
        step(mlp.down_proj(product))
        return [(after - before) * 1e6 for before, after in zip(times, times[1:])]

    with torch.no_grad():
        rounds = [once() for _ in range(given.rounds)][5:]
        tenth = [sorted(found)[len(rounds) // 10] for found in zip(*rounds)]
        print({name: round(found, 1) for name, found in zip(names, tenth)}, f"together {sum(tenth):.1f} us", flush=True)
        if given.profile:
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(300):
                once()
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
