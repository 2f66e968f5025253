"""Compiles the kernels of a tuning run in several processes, which share Triton's cache on disk with the process that measures."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from meteora_core.bench.contenders import Linears, Setting, make_layer
from meteora_core.bench.shapes import ModelShape
from meteora_core.progress import SILENT, Progress

_log = logging.getLogger(__name__)

MOST_WORKERS = 8
"""The largest number of processes; each holds one layer of the model on the GPU."""

Job = tuple[str, int, int]
"""A size to tune: "group" or "layer", index of the group of linears, and number of tokens."""
Runs = Callable[[str, Linears, int, Setting], Sequence[Callable[[], object]]]
"""A function that returns the works of a size; each runs one configuration."""


@dataclass(frozen=True)
class Layer:
    """The layer that is tuned.

    Attributes:
        shape: Shape of the model.
        setting: Number and rank of the adapters, and top-k.
        dtype: Dtype of weights and inputs.
        device: The device of the weights.
    """

    shape: ModelShape
    setting: Setting
    dtype: torch.dtype
    device: torch.device

    def make(self) -> list[Linears]:
        """Random weights, the same in every call."""
        torch.manual_seed(0)
        return make_layer(self.shape, self.setting, self.dtype, self.device, fused=True)


def workers_for(jobs: int) -> int:
    """The number of processes for this number of jobs on this machine; 1 where more would not help."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2, jobs))


def compile_in_parallel(layer: Layer, jobs: Sequence[Job], runs: Runs, progress: Progress = SILENT) -> None:
    """Run every configuration of every job once, in several processes, so that this process finds its kernels in the cache.

    Configurations that fail are left to this process, which reports them. With one worker nothing is done.

    Args:
        layer: The layer that is tuned.
        jobs: The sizes.
        runs: Function that returns the works of a size; it is imported by its name in the processes.
        progress: Receiver of progress reports.
    """
    workers = workers_for(len(jobs))
    if workers < 2:
        return
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot fork
    with progress.task("compiling", total=len(jobs), unit="sizes") as task, ProcessPoolExecutor(workers, context) as pool:
        # Neighbouring sizes share kernels, so each process takes every workers-th one.
        parts = [list(jobs[index::workers]) for index in range(workers)]
        for done in as_completed([pool.submit(compile_part, layer, part, runs) for part in parts]):
            try:
                task.update(done.result())
            except Exception as problem:
                _log.debug("a compiling process failed: %s", problem)


def compile_part(layer: Layer, jobs: Sequence[Job], runs: Runs) -> int:
    """Run the configurations of some jobs in this process. Returns the number of jobs."""
    linears = layer.make()
    with torch.no_grad():
        for kind, index, tokens in jobs:
            for work in runs(kind, linears[index], tokens, layer.setting):
                try:
                    work()
                except (torch.OutOfMemoryError, torch.AcceleratorError):
                    raise
                except Exception as problem:
                    _log.debug("%s at %d tokens: %s", kind, tokens, problem)
    return len(jobs)
