"""How the library reports progress without printing.

A caller passes a :class:`Progress`; the command line's implementation draws bars with Rich, :class:`NoProgress` does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """One running piece of work with a known or unknown total."""

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        """Move on by ``advance`` units; ``total`` corrects the total; ``fields`` are shown beside the bar (``loss="1.23"``)."""


class Progress(Protocol):
    """Opens tasks and takes messages."""

    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> AbstractContextManager[ProgressBar]:
        """Return a context manager that yields a :class:`ProgressBar`. ``unit`` is ``"B"`` for bytes (shown as MB), else a plural noun."""

    def note(self, message: str) -> None:
        """Say one line to the user (never part of a command's result)."""


class _NoTask:
    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        return None


class NoProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        yield _NoTask()

    def note(self, message: str) -> None:
        return None


SILENT = NoProgress()


class Titled:
    """Reports to another :class:`Progress`, with a word in front of every title.

    Args:
        progress: Where to report.
        word: Such as a model's name: the title ``gsm8k`` becomes ``base: gsm8k``.
    """

    def __init__(self, progress: Progress, word: str) -> None:
        self._progress, self._word = progress, word

    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> AbstractContextManager[ProgressBar]:
        return self._progress.task(f"{self._word}: {title}", total=total, unit=unit)

    def note(self, message: str) -> None:
        self._progress.note(message)
