"""Set-up of the kernel tests. Without a GPU, kernels run in Triton's slow interpreter, so only a covering part of large grids of cases runs there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.covering import covering
from support.nan_scratch import poison

STRENGTH = {
    "test_decode_chosen_rows.py::test_equals_the_reference": 1,
    "test_many_adapters.py::test_equals_the_reference": 1,
    "test_one_launch.py::test_equals_its_members": 2,
    "test_packed.py::test_partial_sums": 2,
    "test_split.py::test_partial_sums": 2,
    "test_wide.py::test_wide_groups_round_once": 2,
}
"""Strength of the covering part: with 2, every pair of values of two parameters is in some case; with 1, every value is. On a GPU all cases run."""


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN in all kernel tests, so that a value that was never written is noticed when it is read or returned."""
    poison(monkeypatch)


def values(item: Any) -> dict[str, str]:
    """The values of a case, by ``parametrize`` mark."""
    found = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found[str(mark.args[0])] = repr([item.callspec.params[name.strip()] for name in names])
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases that the covering part does not need."""
    if torch.cuda.is_available():
        return
    grids: dict[str, list[Any]] = {}
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', '')}"
        if name in STRENGTH and "kernels" in item.path.parts:
            grids.setdefault(name, []).append(item)
    dropped = set()
    for name, cases in grids.items():
        kept = covering([values(item) for item in cases], STRENGTH[name])
        dropped |= {item for place, item in enumerate(cases) if place not in kept}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]
