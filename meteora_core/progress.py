"""Interfaces through which the library reports progress without printing.

A caller passes a :class:`Progress`. The implementation of the command line draws bars with Rich; :class:`NoProgress` does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """The progress of one running task, whose total may be unknown."""

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        """Advance by ``advance`` units; ``total`` replaces the total; ``fields`` are shown next to the bar (``loss="1.23"``)."""


class Progress(Protocol):
    """A receiver of progress and of one-line messages."""

    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> AbstractContextManager[ProgressBar]:
        """Return a context manager that yields a :class:`ProgressBar`. ``unit`` is ``"B"`` for bytes (shown as MB) or a plural noun."""

    def note(self, message: str) -> None:
        """Show one line to the user; it is not part of the command's result."""


class _NoTask:
    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        return None


class NoProgress:
    """A :class:`Progress` that shows nothing."""

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        yield _NoTask()

    def note(self, message: str) -> None:
        return None


SILENT = NoProgress()


class Titled:
    """A :class:`Progress` that puts a word in front of every title and passes it on.

    Args:
        progress: The receiver of the reports.
        word: The word in front of titles, such as a model's name: with ``base``, the title ``gsm8k`` becomes ``base: gsm8k``.
    """

    def __init__(self, progress: Progress, word: str) -> None:
        self._progress, self._word = progress, word

    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> AbstractContextManager[ProgressBar]:
        return self._progress.task(f"{self._word}: {title}", total=total, unit=unit)

    def note(self, message: str) -> None:
        self._progress.note(message)
