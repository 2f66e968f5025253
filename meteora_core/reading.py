"""Reads files of unknown origin: regular files only, and with a one-line error for every failure."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meteora_core.errors import DataError, MeteoraError
from meteora_core.text import printable

Error = type[MeteoraError]

_SHOWN = 200
"""The length in characters above which paths are cut in messages."""


def shown_path(path: object) -> str:
    """Return a path for a message: printable, and cut in the middle if it is very long."""
    text = printable(os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]}"


def describe(error: OSError, path: object) -> str:
    """Return one line that says why ``path`` could not be read.

    Args:
        error: The error of the system call that read it.
        path: The file or folder.
    """
    name, code = shown_path(path), error.errno
    if code == errno.ENOENT:
        if isinstance(path, str | os.PathLike) and Path(path).is_symlink():
            return f"{name} is a link to something that does not exist"
        return f"no such file: {name}"
    if code in (errno.EACCES, errno.EPERM):
        return f"no permission to read {name}"
    if code == errno.EISDIR:
        return f"{name} is a folder, not a file"
    if code == errno.ENOTDIR:
        return f"{name} cannot exist: a part of this path is a file, not a folder"
    if code == errno.ELOOP:
        return f"{name} is a link that leads back to itself"
    if code == errno.ENAMETOOLONG:
        return f"the file name is too long: {name}"
    return f"cannot read {name}: {error.strerror or first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


@contextmanager
def read_errors(path: object, error: Error = DataError, *, hint: str | None = None) -> Iterator[None]:
    """Translate every OSError in this block into an ``error`` that names ``path`` and the problem.

    Args:
        path: The file or folder that is read in the block.
        error: The type of the error to raise.
        hint: The hint of that error.
    """
    try:
        yield
    except OSError as failed:
        raise error(describe(failed, path), hint=hint) from failed


def kind_of(mode: int) -> str:
    """Return the kind of file that a mode describes, in words."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "a file")


def is_regular(path: Path | str) -> bool:
    """Whether ``path`` is a regular file or a link to one; False also if the path cannot be looked up."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def check_regular(path: Path | str, error: Error = DataError, *, hint: str | None = None) -> int:
    """Raise ``error`` unless ``path`` is a regular file, or a link to one. The file is not opened.

    Returns:
        Its size in bytes.
    """
    if "\0" in str(path):
        raise error(f"{shown_path(path)} contains a NUL character, which no path can", hint=hint)
    with read_errors(path, error, hint=hint):
        status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{shown_path(path)} is {kind_of(status.st_mode)}, not a file", hint=hint)
    return status.st_size


def present(path: Path | str, error: Error = DataError, *, hint: str | None = None) -> bool:
    """Whether ``path`` is a regular file; False if nothing exists there. Raises ``error`` if it is anything else or cannot be looked up."""
    try:
        Path(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        pass  # check_regular raises an error that says what is wrong
    check_regular(path, error, hint=hint)
    return True


def open_regular(path: Path | str, error: Error = DataError, *, hint: str | None = None) -> io.BufferedReader:
    """Open a regular file for reading bytes. Folders, pipes, sockets and devices are refused without being opened, because opening a pipe can block.

    Args:
        path: The file to open.
        error: The type of the error to raise.
        hint: The hint of that error.

    Returns:
        The open file.

    Raises:
        MeteoraError: (of the type ``error``) The file is missing, not a regular file, or cannot be opened.
    """
    check_regular(path, error, hint=hint)
    with read_errors(path, error, hint=hint):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    handle = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # the path was replaced after the check
        handle.close()
        raise error(f"{shown_path(path)} is not a regular file", hint=hint)
    return handle


def read_bytes(path: Path | str, error: Error = DataError, *, hint: str | None = None) -> bytes:
    """Read a whole regular file; see :func:`open_regular` for arguments and errors."""
    with open_regular(path, error, hint=hint) as handle, read_errors(path, error, hint=hint):
        return handle.read()


def read_text(path: Path | str, error: Error = DataError, *, hint: str | None = None) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark; line ends become ``\\n``.

    Raises:
        MeteoraError: (of the type ``error``) The file cannot be opened, as in :func:`open_regular`, or is not UTF-8.
    """
    raw = read_bytes(path, error, hint=hint)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        raise error(f"{shown_path(path)} is not UTF-8 text (byte {broken.start + 1})", hint=hint) from broken
    return io.StringIO(text, newline=None).read()
