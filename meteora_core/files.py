"""Files: atomic writes, hashes, JSON and JSON lines, and the places where things are kept."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from meteora_core.errors import DataError, MeteoraError, StorageError
from meteora_core.locks import claim, exclusive, scratch_folder, sweep
from meteora_core.reading import finite, open_regular, parse_json, read_errors, read_text

_SURROGATE = re.compile("[\ud800-\udfff]")


def cache_dir() -> Path:
    """Where downloads and converted models are kept: ``$METEORA_CACHE``, else ``$XDG_CACHE_HOME/meteora``, else ``~/.cache/meteora``."""
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
    """Turn what goes wrong when ``path`` is written into a :class:`StorageError` that says what to do.

    An OSError is meant, and the errors of safetensors that stand for one.
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
    """The OSError that an error stands for; None when it is something else."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(found.group(1)), os.strerror(int(found.group(1))))
    return None


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it over ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never a half. Text is UTF-8 with ``\\n`` line ends. Temporary files that a killed process left are removed.

    Args:
        path: The file to write; its folder is made when missing.
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
    """Make the folders above ``path``; those that were not there are removed again when the block fails and they are empty."""
    made: list[Path] = []
    folder = path.parent
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
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

    Where ``path`` is a link, what it points to is replaced. Temporary folders that a killed process left are removed.

    Args:
        path: The folder to write; its parent is made when missing.
        lock: Hold the lock of ``path`` meanwhile; see :func:`meteora_core.locks.exclusive`.
        wait: Wait for another process that writes it, instead of raising.

    Raises:
        StorageError: The disk is full or the parent is not writable.
        BusyError: Another process writes it.
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
    """Be the only process that writes ``path`` while the block runs; its parent is made when missing, and removed again if it stays empty.

    Raises:
        BusyError: Another process writes it, and ``wait`` is False.
        StorageError: The parent is not writable.
    """
    with ExitStack() as stack:
        with storage_errors(path):
            stack.enter_context(_parents(Path(path)))
            stack.enter_context(exclusive(path, wait=wait))
        yield


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as a safetensors file that any user may read, the same bytes for the same tensors.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    from safetensors.torch import save_file

    with storage_errors(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})  # one key alone: safetensors writes several in random order
        path.chmod(0o666 & ~_umask())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that a killed process never leaves neither; return whether the system could (Linux can)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of the Linux headers
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def holds_other_things(path: Path, marker: str) -> bool:
    """Whether something is at ``path`` that must not be replaced: a file, or a folder that is neither empty nor marked by a file ``marker``."""
    return any(path.iterdir()) and not (path / marker).is_file() if path.is_dir() else path.exists()


def other_entries(folder: Path, ours: Iterable[str]) -> list[str]:
    """The names in ``folder`` that are not among ``ours``, sorted; a folder that does not exist has none."""
    known = {*ours, ".DS_Store", ".gitattributes"}
    return sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, separated by commas, and an ellipsis if there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def sha256(path: Path, *, error: type[MeteoraError] = DataError) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits. Raises ``error`` when it is missing, no regular file, or cannot be read."""
    with open_regular(path, error) as handle, read_errors(path, error):
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinite numbers, which JSON does not have, become null. Raises StorageError."""
    with atomic_write(path) as handle:
        json.dump(finite(value), handle, ensure_ascii=False, indent=2, allow_nan=False)
        handle.write("\n")


def read_json(path: Path, *, error: type[MeteoraError] = DataError, hint: str | None = None) -> Any:
    """Read a JSON file, by the rules of :data:`meteora_core.reading.STRICT_DECODER`; a byte-order mark is passed over.

    Raises:
        MeteoraError: (of the type ``error``) the file is missing or cannot be read, or is not JSON; the line and column are named.
    """
    text = read_text(path, error, hint=hint)
    try:
        return parse_json(text)
    except json.JSONDecodeError as broken:
        raise error(f"{path}:{broken.lineno}:{broken.colno} is not valid JSON: {broken.msg}", hint=hint) from broken
    except (ValueError, RecursionError) as broken:
        raise error(f"{path} cannot be read as JSON: {broken}", hint=hint) from broken


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return how many. Raises StorageError."""
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            handle.write((json.dumps(row) if has_surrogate(line) else line) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, *, required: tuple[str, ...] = (), hint: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, by the rules of :data:`meteora_core.reading.STRICT_DECODER`.

    Blank lines and a byte-order mark are passed over.

    Args:
        path: The file.
        required: Keys that every row must have.
        hint: Shown with an error.

    Raises:
        DataError: The file is missing or cannot be read, or a line is not a JSON object or lacks a key; file, line and column are named.
    """
    with open_regular(path, hint=hint) as handle:
        for number, raw in enumerate(_lines(handle, path, hint), start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                row = parse_json(raw.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as broken:
                raise DataError(f"{path}:{number}:{broken.start + 1} is not UTF-8 text", hint=hint) from broken
            except json.JSONDecodeError as broken:
                raise DataError(f"{path}:{number}:{broken.colno} is not valid JSON: {broken.msg}", hint=hint) from broken
            except (ValueError, RecursionError) as broken:
                raise DataError(f"{path}:{number} cannot be read as JSON: {broken}", hint=hint) from broken
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object", hint=hint)
            for key in required:
                if key not in row:
                    raise DataError(f"{path}:{number} has no field {key!r}", hint=hint)
            yield row


def _lines(handle: IO[bytes], path: Path, hint: str | None) -> Iterator[bytes]:
    """The lines of an open file; only what reading them raises is translated, not what happens to a caller between two lines."""
    while True:
        with read_errors(path, hint=hint):
            line = handle.readline()
        if not line:
            return
        yield line
