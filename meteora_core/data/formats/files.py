"""The kind of a data file, and its unpacked content."""

from __future__ import annotations

import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

from meteora_core.errors import DataError
from meteora_core.files import storage_errors
from meteora_core.reading import check_regular, first_line, open_regular, read_errors, shown_path

Kind = Literal["json", "csv", "tsv", "parquet", "arrow", "text"]

KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
"""Kinds of files by the ending of the name."""

PACKED = (".gz", ".zst")
"""Endings of packed files, which may follow those of :data:`KINDS`."""

READABLE = "JSON lines, JSON, CSV, TSV, Parquet, Arrow and text, also packed by gzip or zstd"

MAX_RATIO = 200
"""The largest ratio of unpacked to packed size; files with a larger ratio are refused if they unpack to more than :data:`FREE_BYTES`."""
FREE_BYTES = 256 << 20
"""The number of bytes that may be unpacked at any ratio."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MAGIC: tuple[tuple[bytes, Kind], ...] = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
_BLOCK = 1 << 20


def bare_name(path: Path) -> str:
    """The name of a data file without the endings for its kind: ``"sql"`` for ``sql.jsonl.gz``."""
    name = path.name
    for endings in (PACKED, tuple(KINDS)):
        ending = next((each for each in endings if name.lower().endswith(each)), "")
        name = name[: len(name) - len(ending)]
    return name


def has_data_name(path: Path) -> bool:
    """Whether a file has the name of a data file."""
    name = path.name.lower()
    name = name.removesuffix(next((each for each in PACKED if name.endswith(each)), ""))
    return any(name.endswith(ending) and name != ending for ending in KINDS)


def kind_of_file(path: Path) -> Kind:
    """The kind of a data file, detected by its first bytes and its name.

    Raises:
        DataError: The file is missing, is not a regular file, or is of a kind that cannot be read.
    """
    check_regular(path)
    with unpacked(path) as handle, read_errors(path):
        head = handle.read(64)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{shown_path(path)} is UTF-16 text", hint="save it as UTF-8")
    name = path.name.lower()
    name = name.removesuffix(next((each for each in PACKED if name.endswith(each)), ""))
    named = next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)
    if named in ("parquet", "arrow"):
        raise DataError(f"{shown_path(path)} is not in the {named.title()} format", hint="write it again, or name another file")
    if named is None and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "json"
    if named is None:
        raise DataError(f"cannot tell what kind of file {shown_path(path)} is", hint=f"its name must end in one of {', '.join(KINDS)}")
    return named


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading. Content that gzip or zstd packed is unpacked, whatever the name of the file.

    Raises:
        DataError: The file is missing, broken or not a regular file, or its unpacked content is too large.
    """
    with open_regular(path) as packed:
        with read_errors(path):
            head = packed.read(4)
            packed.seek(0)
        if head.startswith(_GZIP):
            with gzip.GzipFile(fileobj=packed, mode="rb") as unzipped:
                yield _limited(unzipped, path)
        elif head.startswith(_ZSTD):
            import pyarrow

            yield _limited(pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd"), path)
        else:
            yield packed


@contextmanager
def plain_file(path: Path) -> Iterator[Path]:
    """Yield a file with the unpacked content of ``path`` under a name without wildcards and endings: a link, or a copy if ``path`` is packed.

    Raises:
        DataError: The errors of :func:`unpacked`.
        StorageError: The copy cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="meteora-data-") as folder, unpacked(path) as handle:
        plain = Path(folder) / "data"
        if not isinstance(handle.raw, _Counted):
            plain.symlink_to(path.resolve())
        else:
            with open(plain, "wb") as copy:
                while block := handle.read(_BLOCK):
                    with storage_errors(plain):
                        copy.write(block)
        yield plain


class _Counted(io.RawIOBase):
    """A stream of unpacked bytes that raises an error above a limit."""

    def __init__(self, source: IO[bytes], path: Path) -> None:
        self._source, self._path, self._total = source, path, 0
        self._most = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        with _unpacking(self._path):
            block = self._source.read(len(buffer))
        self._total += len(block)
        if self._total > self._most:
            raise DataError(
                f"{shown_path(self._path)} unpacks to more than {self._most / 1e6:,.0f} MB, which is refused", hint="unpack it yourself if you trust it"
            )
        buffer[: len(block)] = block
        return len(block)


def _limited(source: object, path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Counted(cast("IO[bytes]", source), path), _BLOCK)


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Translate errors of the unpacking into errors that name the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as broken:
        raise DataError(f"{shown_path(path)} is a broken gzip file: {first_line(broken)}", hint="get the file again") from broken
    except OSError as broken:
        raise DataError(f"{shown_path(path)} cannot be unpacked: {first_line(broken)}", hint="get the file again") from broken
