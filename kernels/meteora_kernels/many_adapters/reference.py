"""The launches of :mod:`meteora_kernels.many_adapters.launch` in plain PyTorch, for one member and slot at a time. Tests compare with them."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_by_adapter(picks: Tensor, adapters: int) -> list[Tensor]:
    """The tokens of every adapter in ascending order, from the adapter of every token ``picks``, int (M,)."""
    return [torch.nonzero(picks == adapter).flatten() for adapter in range(adapters)]


def middle_of(x: Tensor, lora_A: Tensor, picks: Tensor, factors: Tensor, offsets: Tensor, places: int) -> Tensor:
    """``w_j s_j A x`` of every token's adapter (M, places), with 0 past the adapter's rank, in the dtype of x.

    Args:
        x: Input (M, h).
        lora_A: A of all adapters (R, h).
        picks: Adapter of every token, int (M,).
        factors: ``w_j s_j`` of every token (M,).
        offsets: Row ranges of the adapters, int64 (N + 1,).
        places: Number of columns of the result, at least the largest rank.
    """
    middle = x.new_zeros(x.shape[0], places)
    for token, (pick, factor) in enumerate(zip(picks.tolist(), factors.tolist(), strict=True)):
        first, last = int(offsets[pick]), int(offsets[pick + 1])
        middle[token, : last - first] = factor * (lora_A[first:last] @ x[token])
    return middle
