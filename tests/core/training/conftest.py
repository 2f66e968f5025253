"""Rows and adapters for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_training import adapter, write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of the datasets ``shout`` and ``count``."""
    return write_data(tmp_path / "datasets")


@pytest.fixture
def adapters(data: Path, tmp_path: Path) -> Path:
    """The folder of an adapter of each dataset."""
    for task in ("shout", "count"):
        adapter(data, tmp_path / "adapters", task)
    return tmp_path / "adapters"
