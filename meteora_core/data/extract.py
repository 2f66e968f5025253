"""The form in which every source passes a task's raw rows to the builder."""

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
        origin: Origin of the rows for the manifest: ``kind``, ``name`` and identifiers of the version (hashes, revision).
        rule: Rule that divides train and test rows, in words.
        seed: Seed of that rule, or None.
        rows: Function that yields the rows of a split.
        splits: Names of the splits.
        counts: Number of rows of each split, if it is known before reading.
        duplicates_dropped: Number of duplicate examples that were dropped.
        frame: Frame of the prompts, if it is known.
        example: The first row, if it was read.
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
