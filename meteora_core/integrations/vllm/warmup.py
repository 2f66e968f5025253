"""Compiles the GPU kernels for all sizes before a server is ready, several at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from meteora_core.integrations.vllm.mixing import Layer

THREADS = "METEORA_VLLM_COMPILE_THREADS"
"""The environment variable with the number of kernels to compile at the same time, from 1 to 64; default: 8, or the number of processors if it is smaller."""
LARGE = (257, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 8192, 16384)
"""Numbers of tokens above the captured ones for which the kernels may differ."""


def sizes(captured: Iterable[int], most: int) -> list[int]:
    """The numbers of tokens to warm up: the captured ones, and larger ones up to ``most``, both multiples of 16 and others, for which Triton compiles
    different code.

    Example:
        >>> sizes([1, 8], 400)
        [1, 8, 257, 320, 321, 384, 385, 400]
    """
    small = {size for size in captured if size <= most}
    large = {size + more for size in LARGE for more in (0, 1) if size + more <= most and size % 16 + more < 2}
    return sorted(small | large | {most})


def different(layers: Iterable[Layer]) -> list[Layer]:
    """One layer of each shape."""
    found: dict[Any, Layer] = {}
    for layer in layers:
        block = layer.block
        found.setdefault((block.shape.widths, block.shape.ranks, tuple(block.rows.shape), block.base, layer.sums, layer.eight is None), layer)
    return list(found.values())


def threads() -> int:
    """The number of kernels to compile at the same time."""
    try:
        wanted = int(os.environ.get(THREADS) or 0)
    except ValueError:
        wanted = 0
    return min(64, wanted) if wanted > 0 else max(1, min(8, os.cpu_count() or 1))


def warm_up(tokens: list[int]) -> int:
    """Run every layer shape whose kernels run on a GPU with every number of tokens; returns the number of runs.

    Layers that add up gate logits over the processes of a tensor-parallel group run in the same order in all of them.
    """
    from meteora_core.integrations.vllm import operators

    layers = [layer for layer in different(operators.layers()) if layer.kernels]
    alone = [(layer, count) for layer in layers if layer.sums for count in tokens]
    apart = [(layer, count) for count in tokens for layer in layers if not layer.sums]
    with torch.inference_mode(), ThreadPoolExecutor(threads()) as pool:
        list(pool.map(lambda pair: run(*pair), apart))
        for pair in alone:
            run(*pair)
    if apart or alone:
        torch.cuda.synchronize()
    return len(apart) + len(alone)


def run(layer: Layer, tokens: int) -> None:
    """Run a layer with zeros."""
    from meteora_core.integrations.vllm import operators

    with torch.inference_mode():
        rows, outputs = layer.block.rows, sum(layer.block.shape.widths)
        x = torch.zeros(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
        if layer.block.base:
            operators.group(x, rows, outputs)
        elif layer.eight is not None:
            operators.eight(x, x.to(torch.float8_e4m3fn), torch.ones(tokens, 1, device=rows.device), rows, outputs)
        else:
            operators.add(x, torch.zeros(tokens, outputs, dtype=rows.dtype, device=rows.device), rows)  # which has the kernels of "over", too


def before_capture(function: Callable[..., Any], worker: Any, *arguments: Any, **named: Any) -> Any:
    """vLLM's own warm-up, then that of the layers with adapters; CUDA graphs are captured after it."""
    found = function(worker, *arguments, **named)
    captured = worker.vllm_config.compilation_config.cudagraph_capture_sizes or []
    warm_up(sizes(map(int, captured), int(worker.scheduler_config.max_num_batched_tokens)))
    return found
