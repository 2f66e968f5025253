"""What every source hands to the builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from meteora_core.data.frames import Frame
from meteora_core.data.rows import Row, Split
from meteora_core.errors import DataError


class NotHere(DataError):
    """A source does not have the task, or cannot be reached; another source may be tried."""


@dataclass(frozen=True)
class Extract:
    """A task's raw rows in one source.

    Args:
        origin: Where they come from, for the manifest: ``kind``, ``name`` and what identifies the version (hashes, revision).
        rule: How train and test were told apart, in words.
        seed: The seed of that rule, or None.
        rows: Called with a split's name, yields its rows.
        splits: The splits that there are.
        counts: How many rows each split has, where that is known before reading.
        duplicates_dropped: How many duplicate examples were left out.
        frame: What stands around the user's text in the prompts, where that is known.
        example: The first row, where it was looked at.
    """

    origin: dict[str, Any]
    rule: str
    seed: int | None
    rows: Callable[[Split], Iterator[Row]]
    splits: tuple[Split, ...] = ("train", "test")
    counts: dict[str, int] = field(default_factory=dict)
    duplicates_dropped: int = 0
    frame: Frame | None = None
    example: Row | None = None
