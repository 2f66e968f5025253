"""The rows of the stacked A and B that each adapter owns, as small tables that are built once for each ``offsets`` tensor."""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The adapters' ranks, as numbers on the host and tables on the device.

    Attributes:
        adapters: Number of adapters N.
        total_rank: Sum of the ranks R.
        max_rank: The largest rank; 0 if R is 0.
        uniform: Whether every adapter has rank ``max_rank``.
        rows: Rows of every adapter, int64 (N, max_rank); places past an adapter's rank repeat an existing row, with coefficient 0.
        valid: Mask that is False past an adapter's rank, bool (N, max_rank); None if ``uniform``.
    """

    adapters: int
    total_rank: int
    max_rank: int
    uniform: bool
    rows: Tensor
    valid: Tensor | None


def build(offsets: Tensor) -> Layout:
    """The layout of ``offsets`` (N + 1,). The host reads it, so it waits for the GPU once.

    Raises:
        ValueError: The offsets do not start at 0 or decrease.
    """
    bounds = offsets.tolist()
    ranks = [after - before for before, after in itertools.pairwise(bounds)]
    if bounds[0] != 0 or min(ranks) < 0:
        raise ValueError(f"offsets must start at 0 and never decrease, got {bounds}")
    widest = max(ranks)
    uniform = min(ranks) == widest
    steps = torch.arange(widest, device=offsets.device)
    rows = offsets[:-1, None] + steps
    valid = None
    if not uniform:
        valid = steps < (offsets[1:] - offsets[:-1])[:, None]
        rows = torch.where(valid, rows, torch.clamp(offsets[:-1, None], max=bounds[-1] - 1))
    return Layout(len(ranks), bounds[-1], widest, uniform, rows, valid)


_known: MutableMapping[Tensor, tuple[int, Layout]] = WeakTensorKeyDictionary()


def layout_of(offsets: Tensor) -> Layout:
    """The cached layout of ``offsets``; rebuilt if the tensor has been written to."""
    version = 0 if offsets.is_inference() else offsets._version
    found = _known.get(offsets)
    if found is None or found[0] != version:
        with torch.no_grad():
            found = (version, build(offsets))
        _known[offsets] = found
    return found[1]
