"""Small checkpoints in the authors' layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support.authors_files import Authors, write_authors


@pytest.fixture
def make_authors(tmp_path: Path) -> Callable[..., Authors]:
    return partial(write_authors, tmp_path)
