"""Errors that a user can act on.

Every failure with a known cause raises :class:`MeteoraError` (exit code 1 on the command line) or :class:`UsageError` (exit code 2).
Both carry one line that says what happened and, if possible, a hint that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from meteora_core.text import redact


class MeteoraError(Exception):
    """A known failure.

    Args:
        message: What happened, in one line. Passwords and tokens in it are replaced by :func:`meteora_core.text.redact`.
        hint: What the user can do about it, in one line.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = redact(message)
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MeteoraError):
    """The request itself is wrong: an unknown name, a value out of range, a broken configuration file."""

    exit_code = 2


class DataError(MeteoraError):
    """A dataset, or a file that a dataset is built from, is broken or missing."""


class AdapterError(MeteoraError):
    """An adapter cannot be used: wrong kind, wrong shapes, or it does not fit the base model."""


class CheckpointError(MeteoraError):
    """A checkpoint is broken, incomplete, or belongs to another base model or other adapters."""


class DownloadError(MeteoraError):
    """A download failed, or the downloaded file is not the expected one."""


class NonFiniteError(MeteoraError):
    """A model computed NaN or infinity: its weights are broken, or its dtype's range is too small."""


class StorageError(MeteoraError):
    """A file could not be written, for example because the disk is full or a permission is missing."""


class BusyError(StorageError):
    """Another process is writing the same file or folder."""


def did_you_mean(name: str, choices: Iterable[str]) -> str | None:
    """Return a hint that names the entry of ``choices`` closest to ``name``, or None if none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(choices), n=1)
    return f"did you mean {close[0]!r}?" if close else None
