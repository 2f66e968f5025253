"""Memory that kernels have not written yet holds NaN: what they read or return must have been written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

NO_ROW = 1 << 28
"""What unwritten integers hold: more than there are rows or tokens anywhere."""


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, but what it returns holds NaN, or :data:`NO_ROW` for integers."""

    def filled(*arguments: Any, **options: Any) -> Tensor:
        found = empty(*arguments, **options)
        if type(found) is Tensor and not found.is_meta and not torch.compiler.is_compiling() and found.dtype != torch.bool:
            with torch.no_grad():
                found.fill_(float("nan") if found.is_floating_point() else min(NO_ROW, torch.iinfo(found.dtype).max))
        return found

    return filled


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new tensors that nobody has written hold NaN, whoever makes them."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
