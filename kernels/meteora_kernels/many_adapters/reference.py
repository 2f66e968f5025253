"""What the launches of :mod:`meteora_kernels.many_adapters.launch` compute, in plain PyTorch and for one group (one member and slot) at a time; for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_by_adapter(picks: Tensor, adapters: int) -> list[Tensor]:
    """The tokens of every adapter, in order. picks: int (M,)."""
    return [torch.nonzero(picks == adapter).flatten() for adapter in range(adapters)]


def middle_of(x: Tensor, lora_A: Tensor, picks: Tensor, factors: Tensor, offsets: Tensor, places: int) -> Tensor:
    """``w_j s_j A x`` of every token's adapter, (M, places), 0 past the adapter's rank, in the dtype of x.

    Args:
        x: (M, h).
        lora_A: (R, h).
        picks: int (M,), an adapter for every token.
        factors: (M,), ``w_j s_j``.
        offsets: int64 (N + 1,).
        places: At least the largest rank.
    """
    middle = x.new_zeros(x.shape[0], places)
    for token, (pick, factor) in enumerate(zip(picks.tolist(), factors.tolist(), strict=True)):
        first, last = int(offsets[pick]), int(offsets[pick + 1])
        middle[token, : last - first] = factor * (lora_A[first:last] @ x[token])
    return middle
