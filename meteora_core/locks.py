"""Locks that let one process at a time write a path, and temporary files that can be recognised as abandoned.

Both use ``flock``, which the system releases when a process ends for any reason. If the system or a network file system does not support ``flock``,
nothing is locked, a warning is logged, and temporary files of other processes are not removed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meteora_core.errors import BusyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
_held: dict[tuple[int, Path], int] = {}
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


def _flock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder. Return False if another process holds the lock, and None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the file at ``path``."""
    try:
        current = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_ino, opened.st_dev) == (current.st_ino, current.st_dev)


@contextmanager
def exclusive(path: Path | str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of ``path`` while the block runs, so that no other process writes it. Blocks of one process may be nested.

    The lock is a file next to the target (``.NAME.lock``, removed at the end) that names the process that holds it. A killed process releases its locks.

    Args:
        path: The file or folder to lock. It need not exist; its parent folder must.
        wait: Whether to wait for another process to finish, instead of raising.

    Raises:
        BusyError: Another process is writing ``path``; the message names the process, its command and its start time.
        OSError: The lock file cannot be written.
    """
    target = Path(path).resolve()
    key = (os.getpid(), target)
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    file = target.with_name(f".{target.name}.lock")
    descriptor = _acquire(file, target, wait)
    _held[key] = 1
    try:
        yield
    finally:
        del _held[key]
        if descriptor is not None:
            with suppress(OSError):
                file.unlink()  # before the lock is released, so that a waiting process sees that the file was replaced
            os.close(descriptor)


def _acquire(file: Path, target: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            locked = _flock(descriptor, wait=wait)
            if locked is None:
                _log.warning("%s cannot be locked on this file system: do not run the same command twice at once", target.parent)
                os.close(descriptor)
                file.unlink(missing_ok=True)
                return None
            if not locked:
                raise _busy(target, os.pread(descriptor, 4096, 0))
            if _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
                return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)


def _myself() -> dict[str, str | int]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    shown = "".join(letter if letter.isprintable() else "?" for letter in command)
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": shown, "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _busy(target: Path, holder: bytes) -> BusyError:
    try:
        known = json.loads(holder)
        who = f"process {known['pid']} on {known['host']} ({known['command']}), since {known['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return BusyError(f"{target} is being written by {who}", hint="wait until it has finished, or write to another folder")


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder ``.NAME.XXXXXXXX.tmp`` in ``parent``, which is removed at the end. Such folders of killed processes are removed first.

    Raises:
        OSError: The folder cannot be created.
    """
    sweep(parent / name)
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".tmp"))
        descriptor = claim(folder)
        if descriptor is not None:
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def claim(path: Path) -> int | None:
    """Mark a new temporary file or folder as in use. Return an open descriptor to close at the end, or None if another process already removed it."""
    try:
        descriptor = os.open(path if fcntl is not None else os.devnull, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return None
    if _flock(descriptor, wait=True) is None or _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def sweep(path: Path) -> None:
    """Remove the temporary files and folders and the lock for ``path`` that killed processes left behind. Those of running processes stay.

    If a process was killed while it replaced ``path``, the previous content is restored.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    try:
        names = sorted(entry.name for entry in os.scandir(path.parent) if entry.name.startswith(f".{path.name}.") and pattern.fullmatch(entry.name))
    except OSError:
        return
    for name in [*sorted(names, key=lambda name: not name.endswith(".old")), f".{path.name}.lock"]:
        _remove_abandoned(path.with_name(name), path)


def _remove_abandoned(temporary: Path, path: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _flock(descriptor) is not True or not _is_at(descriptor, temporary):
                return
            if temporary.suffix == ".old" and not path.exists():
                os.rename(temporary / "x", path)
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink()
        finally:
            os.close(descriptor)
