"""Errors that a user can act on.

Everything that goes wrong for a known reason raises :class:`MeteoraError` (exit code 1 at the command line) or
:class:`UsageError` (exit code 2). Both carry one line that says what happened and, where there is one, a hint that says what to do.
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
    """A dataset, or a file that one is made from, is broken or missing."""


class AdapterError(MeteoraError):
    """An adapter cannot be used: wrong kind, wrong shapes, or it does not fit the base model."""


class CheckpointError(MeteoraError):
    """A checkpoint is broken, incomplete, or belongs to another base model or other adapters."""


class DownloadError(MeteoraError):
    """A download failed, or what arrived is not what was promised."""


class NonFiniteError(MeteoraError):
    """A model computed NaN or infinity: its weights are broken, or its dtype's range is too small."""


class StorageError(MeteoraError):
    """A file could not be written: full disk, no permission."""


class BusyError(StorageError):
    """Another process is writing the same file or folder."""


def did_you_mean(name: str, choices: Iterable[str]) -> str | None:
    """Return a hint that names the closest of ``choices`` to ``name``, or None when nothing is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(choices), n=1)
    return f"did you mean {close[0]!r}?" if close else None
