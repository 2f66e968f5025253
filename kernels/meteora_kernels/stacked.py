"""The layout in which the gate and A of a layer are stacked for one product: ``[G; padding; A; padding]``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def gate_rows_of(adapters: int) -> int:
    """Rows of the gate and its padding in a stacked [G; A]: N rounded up to a multiple of 8, so that A starts aligned."""
    return -(-adapters // 8) * 8


def stacked_rows_of(adapters: int, rank: int) -> int:
    """Rows of a stacked [G; A]: a multiple of 64, because GEMM libraries run at half speed on other widths."""
    return -(-(gate_rows_of(adapters) + rank) // 64) * 64


@lru_cache(maxsize=32)
def _blank(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of zeros, cached because they are only read."""
    return torch.zeros(rows, width, dtype=dtype, device=device)


def pack(gate: Tensor, lora_A: Tensor) -> Tensor:
    """The stacked matrix [G; padding; A; padding] (stacked, h), made in one copy."""
    adapters, rank = gate.shape[0], lora_A.shape[0]
    before = gate_rows_of(adapters)
    after = stacked_rows_of(adapters, rank)
    capturing = gate.is_cuda and torch.cuda.is_current_stream_capturing()  # tensors created during capture live in the graph's own memory
    blank = (_blank.__wrapped__ if capturing else _blank)(64, gate.shape[1], gate.dtype, gate.device)
    return torch.cat([gate, blank[: before - adapters], lora_A, blank[: after - before - rank]])
