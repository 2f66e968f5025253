"""Atomic writes of files and folders, hashes, and the folder of downloads."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from meteora_core.errors import DataError, MeteoraError, StorageError
from meteora_core.locks import claim, exclusive, scratch_folder, sweep
from meteora_core.reading import open_regular, read_errors


def cache_dir() -> Path:
    """Return the folder of downloads and converted models: ``$METEORA_CACHE``, else ``$XDG_CACHE_HOME/meteora``, else ``~/.cache/meteora``."""
    explicit = os.environ.get("METEORA_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "meteora"


_REASONS = {
    errno.ENOSPC: ("no space left on the disk", "free some space, or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another folder"),
    errno.EFBIG: ("the file is larger than this process or the file system allows", "see `ulimit -f`, or choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.ELOOP: ("its links form a loop", "remove the link, or choose another folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.ENOENT: ("the folder was removed meanwhile", "start the same command again"),
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate errors of writing ``path`` into a :class:`StorageError` that says what to do.

    This applies to every OSError, and to errors of safetensors that wrap one.
    """
    try:
        yield
    except MeteoraError:
        raise
    except Exception as error:
        failed = _os_error(error)
        if failed is None:
            raise
        reason, hint = _REASONS.get(failed.errno or 0, (failed.strerror or str(failed), "check that the folder exists and is writable"))
        raise StorageError(f"cannot write {path}: {reason}", hint=hint) from error


def _os_error(error: Exception) -> OSError | None:
    """Return the OSError that ``error`` is or reports; None if it is another kind of error."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(number.group(1)), os.strerror(int(number.group(1))))
    return None


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file next to ``path`` and rename it over ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never a partial one. Text is UTF-8 with ``\\n`` line ends. Temporary files of killed processes are removed.

    Args:
        path: The file to write; its folder is created if missing.
        mode: ``"w"`` for text or ``"wb"`` for bytes.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    path = Path(path)
    with storage_errors(path), _parents(path):
        sweep(path)
        while True:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            temporary = Path(name)
            if (claimed := claim(temporary)) is not None:
                break
            os.close(descriptor)
        try:
            text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
            with os.fdopen(descriptor, mode, **text) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(claimed)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Create the folders above ``path``. If the block fails, the folders that this created are removed again, unless they contain something."""
    created: list[Path] = []
    folder = path.parent
    while not folder.exists():
        created.append(folder)
        folder = folder.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(path: Path, *, lock: bool = True, wait: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block ends without an error, and is removed otherwise.

    If ``path`` is a link, its target is replaced. Temporary folders of killed processes are removed.

    Args:
        path: The folder to write; its parent is created if missing.
        lock: Whether to hold the lock of ``path`` while the block runs; see :func:`meteora_core.locks.exclusive`.
        wait: Whether to wait for another process that is writing the folder, instead of raising.

    Raises:
        StorageError: The disk is full or the parent is not writable.
        BusyError: Another process is writing the folder.
    """
    with storage_errors(path):
        path = Path(path).resolve()
    with storage_errors(path), _parents(path), exclusive(path, wait=wait) if lock else nullcontext(), scratch_folder(path.parent, path.name) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.rename(path, old / "x")
            os.rename(temporary, path)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of ``path`` while the block runs. Its parent is created if missing, and removed again if the block fails and it is empty.

    Raises:
        BusyError: Another process is writing ``path``, and ``wait`` is False.
        StorageError: The parent is not writable.
    """
    with ExitStack() as stack:
        with storage_errors(path):
            stack.enter_context(_parents(Path(path)))
            stack.enter_context(exclusive(path, wait=wait))
        yield


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as a safetensors file that every user may read. Equal tensors give equal bytes.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    from safetensors.torch import save_file

    with storage_errors(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})  # one key only: safetensors writes several in random order
        path.chmod(0o666 & ~_umask())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that one of them exists even if the process is killed. Return whether the system supports this (Linux does)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    working_folder, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of the Linux headers
    return bool(renameat2(working_folder, os.fsencode(one), working_folder, os.fsencode(other), swap) == 0)


def holds_other_things(path: Path, marker: str) -> bool:
    """Whether ``path`` must not be replaced: it is a file, or a folder that is neither empty nor contains a file named ``marker``."""
    return any(path.iterdir()) and not (path / marker).is_file() if path.is_dir() else path.exists()


def other_entries(folder: Path, ours: Iterable[str]) -> list[str]:
    """Return the names in ``folder`` that are not among ``ours``, sorted; an empty list if the folder does not exist."""
    known = {*ours, ".DS_Store", ".gitattributes"}
    return sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []


def sha256(path: Path, *, error: type[MeteoraError] = DataError) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits. Raises ``error`` if it is missing, not a regular file, or cannot be read."""
    with open_regular(path, error) as handle, read_errors(path, error):
        return hashlib.file_digest(handle, "sha256").hexdigest()
