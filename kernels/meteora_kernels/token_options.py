"""Options that differ from token to token, in one tensor that the kernels read.

Each token has a row of N + 2 float32 values: for every adapter, 1 if it may be chosen and 0 otherwise; the number of adapters (0 for none); and the routing
temperature. The number of adapters is at most ``Routing.top_k``, up to which a kernel chooses. Because the tensor is an ordinary argument, its values can
change between two replays of a CUDA graph.

A tensor (M, N + 2, 1) may also hold rows of tokens with a static mix instead of gates, whose temperature is 0: they have the weight of every adapter, 0 for
adapters that take no part, and the number of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def option_row(adapters: int, top_k: int, temperature: float, allowed: Iterable[int] | None = None) -> list[float]:
    """The row of a token.

    Args:
        adapters: Number of adapters N.
        top_k: Number of adapters of the token; 0 for the base alone.
        temperature: Routing temperature T > 0.
        allowed: Indices of the adapters that may be chosen; None for all.

    Example:
        >>> option_row(3, 1, 2.0, allowed=[0, 2])
        [1.0, 0.0, 1.0, 1.0, 2.0]
    """
    chosen = set(range(adapters) if allowed is None else allowed)
    return [*(float(index in chosen) for index in range(adapters)), float(top_k), temperature]


def mix_row(adapters: int, weights: Mapping[int, float]) -> list[float]:
    """The row of a token with a static mix.

    Args:
        adapters: Number of adapters N.
        weights: Weights by adapter index.

    Example:
        >>> mix_row(3, {2: 0.5, 0: 0.0})
        [0.0, 0.0, 0.5, 1.0, 0.0]
    """
    return [*(float(weights.get(index, 0.0)) for index in range(adapters)), float(sum(weight != 0 for weight in weights.values())), 0.0]


def new_options(tokens: int, row: list[float], device: torch.device | str | None = None) -> Tensor:
    """The same options for a number of tokens: float32 (M, N + 2), for ``Routing.allowed``.

    Example:
        >>> new_options(5, option_row(3, 2, 1.0)).shape
        torch.Size([5, 5])
    """
    return torch.tensor(row, dtype=torch.float32, device=device).repeat(tokens, 1)
