"""JSON and JSON lines, decoded strictly and written so that every reader can decode them."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from meteora_core.errors import DataError, MeteoraError
from meteora_core.files import atomic_write
from meteora_core.reading import check_regular, first_line, open_regular, read_bytes, read_errors, shown_path
from meteora_core.text import shown

Error = type[MeteoraError]

MAX_OBJECT_BYTES = 256 << 20
"""The size of the largest configuration file that is read, in bytes."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number of {len(digits)} digits is too large") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(repeated)} occurs twice in one object")
    return mapping


STRICT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_integer, object_pairs_hook=_unique_keys)
"""Decodes JSON as the standard defines it. NaN, infinities (also a number that overflows to one), integers of thousands of digits, and keys that occur
twice in one object raise ValueError."""

_LENIENT_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_unique_keys)
"""Decodes JSON as :data:`STRICT_DECODER` does, but accepts NaN and infinities."""


def decode_json(text: str) -> Any:
    """Decode a JSON document with :data:`STRICT_DECODER`. Raises ValueError (json.JSONDecodeError for bad syntax) or RecursionError."""
    return STRICT_DECODER.decode(text)


def parse_json(raw: bytes, source: str, *, line: int | None = None, nullable: str | None = None, error: Error = DataError, hint: str | None = None) -> Any:
    """Decode a JSON document of unknown origin: UTF-8, with or without a byte-order mark, by the rules of :data:`STRICT_DECODER`.

    Args:
        raw: The bytes of the document.
        source: The name of the document in error messages.
        line: The line number of the document in a file of JSON lines.
        nullable: A key of the outermost object, or "*" for all keys. NaN and infinities below it, which earlier versions wrote, are read as None.
        error: The type of the error that is raised.
        hint: The hint of that error.

    Raises:
        MeteoraError: (of the type ``error``) The document is not UTF-8 or not strict JSON. The message gives the line and column if they are known.
    """
    where = source if line is None else f"{source}:{line}"
    try:
        text = raw.decode("utf-8-sig" if line is None or line == 1 else "utf-8")
        return _with_nulls(_LENIENT_DECODER.decode(text), nullable) if nullable else STRICT_DECODER.decode(text)
    except UnicodeDecodeError as broken:
        message = f"{where} is not UTF-8 text (byte {broken.start + 1})" if line is None else f"{where}:{broken.start + 1} is not UTF-8 text"
        raise error(message, hint=hint) from broken
    except json.JSONDecodeError as broken:
        row = broken.lineno if line is None else line
        raise error(f"{source}:{row}:{broken.colno} is not valid JSON: {broken.msg}", hint=hint) from broken
    except (ValueError, RecursionError) as broken:
        raise error(f"{where} cannot be read as JSON: {first_line(broken)}", hint=hint) from broken


def _with_nulls(value: Any, nullable: str) -> Any:
    """Return ``value`` with None for each non-finite number below the key ``nullable``. Raises ValueError for a non-finite number elsewhere."""
    if nullable == "*":
        return finite(value)
    for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
        if key != nullable:
            _require_finite(entry)
    return {**value, nullable: finite(value[nullable])} if isinstance(value, dict) and nullable in value else value


def _require_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_finite(entry)


def finite(value: Any) -> Any:
    """Return ``value`` with None for every NaN and infinite number, so that JSON can express it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def has_surrogate(text: str) -> bool:
    """Whether a text contains half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def read_json(path: Path, *, error: Error = DataError, hint: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file to read.
        error: The type of the error that is raised.
        hint: The hint of that error.

    Raises:
        MeteoraError: (of the type ``error``) The file is missing, unreadable or not a regular file, or :func:`parse_json` refuses its content.
    """
    return parse_json(read_bytes(path, error, hint=hint), shown_path(path), error=error, hint=hint)


def read_object(path: Path, *, nullable: str | None = None, error: Error = DataError, hint: str | None = None) -> dict[str, Any]:
    """Read a configuration file that contains one JSON object; see :func:`read_json` and :func:`parse_json` for arguments and errors."""
    size = check_regular(path, error, hint=hint)
    if size > MAX_OBJECT_BYTES:
        raise error(f"{shown_path(path)} has {size:,} bytes, more than a configuration file can have ({MAX_OBJECT_BYTES:,})", hint=hint)
    value = parse_json(read_bytes(path, error, hint=hint), shown_path(path), nullable=nullable, error=error, hint=hint)
    if not isinstance(value, dict):
        raise error(f"{shown_path(path)} is not a JSON object", hint=hint)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinite numbers, which JSON does not have, become null. Raises StorageError."""
    with atomic_write(path) as handle:
        json.dump(finite(value), handle, ensure_ascii=False, indent=2, allow_nan=False)
        handle.write("\n")


def read_jsonl(path: Path, *, required: tuple[str, ...] = (), hint: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file. Blank lines and a byte-order mark are skipped.

    Args:
        path: The file to read.
        required: The keys that every row must have.
        hint: The hint of the error that is raised.

    Raises:
        DataError: The file is missing or unreadable, or a line is not a strict JSON object or lacks a required key. The message gives file, line and column.
    """
    with open_regular(path, hint=hint) as handle:
        yield from iter_jsonl(handle, path, required=required, hint=hint)


def iter_jsonl(handle: IO[bytes], path: Path, *, required: tuple[str, ...] = (), hint: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of an open JSON-lines file that messages call ``path``; see :func:`read_jsonl`."""
    for number, raw in enumerate(_lines(handle, path, hint), start=1):
        if not (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).strip():
            continue
        row = parse_json(raw.rstrip(b"\r\n"), str(path), line=number, hint=hint)
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is not a JSON object", hint=hint)
        for key in required:
            if key not in row:
                raise DataError(f"{path}:{number} has no field {key!r}", hint=hint)
        yield row


def _lines(handle: IO[bytes], path: Path, hint: str | None) -> Iterator[bytes]:
    """Yield the lines of an open file. Errors of reading are translated; errors that the caller raises between two lines are not."""
    while True:
        with read_errors(path, hint=hint):
            line = handle.readline()
        if not line:
            return
        yield line


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line, atomically, and return the number of rows. Raises StorageError."""
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            handle.write((json.dumps(row) if has_surrogate(line) else line) + "\n")
            count += 1
    return count
