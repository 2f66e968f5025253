"""Timings by medians, with a warm-up, contenders in turn and in changing order, and optional CUDA graphs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Conditions of a measurement.

    Attributes:
        dtype: Dtype of weights and inputs.
        device: Device of weights and inputs; None for the GPU if there is one, otherwise the CPU.
        graph: Whether to replay CUDA graphs on a CUDA device. A contender that cannot be captured runs in mode "eager".
        seconds: Approximate duration of one measurement in seconds.
    """

    dtype: torch.dtype = torch.bfloat16
    device: torch.device | None = None
    graph: bool = True
    seconds: float = 2.0

    @property
    def place(self) -> torch.device:
        """The device on which works run."""
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def captured(self) -> bool:
        """Whether CUDA graphs are replayed."""
        return self.graph and self.place.type == "cuda"


def capture(work: Work, pool: Any = None) -> Work:
    """A CUDA graph of ``work``, as a function that replays it.

    Args:
        work: Function to capture.
        pool: Memory pool (``torch.cuda.graph_pool_handle()``) to share with other graphs whose results are not kept; None for separate memory.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def medians(works: dict[str, Work], device: torch.device, *, repeats: int, seconds: float, before: Work | None = None) -> dict[str, float]:
    """Median times in milliseconds of works that run in turn, so that a drift of the machine affects all of them.

    Every round has another order, drawn with a fixed seed: the clock of a GPU and the content of its cache depend on the work that ran before, so no work
    may always follow the same one.

    Args:
        works: Functions to time, by name.
        device: Device on which they run; CUDA works are timed by events.
        repeats: Largest number of rounds.
        seconds: Time in seconds after which no further round starts; there are at least five rounds.
        before: Function that runs before every work and is not timed.
    """
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    started, order = time.perf_counter(), random.Random(0)
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - started > seconds:
            break
        for name in order.sample(list(works), len(works)):
            taken[name].append(_once(works[name], device, before))
    return {name: statistics.median(values) for name, values in taken.items()}


def pairs(one: Work, other: Work, device: torch.device, count: int, before: Work | None = None) -> list[tuple[float, float]]:
    """Times in milliseconds of two works that run one after the other, ``count`` times.

    Each is first as often as second. ``before`` runs before each work and is not timed.
    """
    taken = []
    for index in range(count):
        if index % 2:
            second = _once(other, device, before)
            taken.append((_once(one, device, before), second))
        else:
            first = _once(one, device, before)
            taken.append((first, _once(other, device, before)))
    return taken


def _once(work: Work, device: torch.device, before: Work | None = None) -> float:
    if before is not None:
        before()
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_memory(work: Work, device: torch.device) -> float | None:
    """Peak memory of ``work`` in MiB, in addition to the memory in use; None for devices other than CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The measured memory rate of a device in GB/s (reads plus writes of a large copy) and its arithmetic rate in TFLOP/s (a large GEMM)."""
    size = 1 << 28 if device.type == "cuda" else 1 << 25
    source = torch.empty(size, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
    right = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
    found = medians({"copy": lambda: target.copy_(source), "gemm": lambda: left @ right}, device, repeats=7, seconds=3.0)
    return 2 * 4 * size / found["copy"] / 1e6, 2 * side**3 / found["gemm"] / 1e9
