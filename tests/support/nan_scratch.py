"""Memory that kernels have not written yet holds NaN: what they read or return must have been written."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

NO_ROW = 1 << 28
"""What unwritten integers hold: more than there are rows or tokens anywhere."""


class Poisoned:
    """``torch``, but :func:`torch.empty` gives NaN, or :data:`NO_ROW` for integers."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: int | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.empty(*size, device="meta").shape  # type: ignore[arg-type]
        return torch.full(shape, float("nan") if dtype.is_floating_point else NO_ROW, dtype=dtype, device=device)


def poison(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Make :func:`torch.empty` give NaN in these modules."""
    for module in modules:
        monkeypatch.setattr(module, "torch", Poisoned())
