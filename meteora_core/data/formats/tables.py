"""Data files and ``datasets`` objects as records, one dictionary of columns for each row.

The standard library reads JSON, CSV and text, so that texts do not change: the type inference of other readers turns ``None`` and ``NA`` into missing
values, ``007`` into 7 and dates into timestamps. The ``datasets`` library reads Parquet, Arrow, saved datasets and datasets on the hub.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from meteora_core.data.formats.files import Kind, kind_of_file, plain_file, unpacked
from meteora_core.errors import DataError
from meteora_core.json_files import iter_jsonl, parse_json
from meteora_core.reading import first_line, shown_path
from meteora_core.text import listed, shown

Record = dict[str, Any]

_LONGEST_FIELD = 1 << 30
"""The largest number of characters in a field of a CSV file; the default of the standard library is 131,072."""


@dataclass(frozen=True)
class Table:
    """Records in order, readable more than once.

    Attributes:
        name: Name of the table in messages.
        read: Function that opens the table and yields its records.
    """

    name: str
    read: Callable[[], Iterator[Record]]


def file_table(path: Path) -> Table:
    """The table of a data file of any kind in :data:`meteora_core.data.formats.files.KINDS`, packed or not.

    Raises:
        DataError: The file is missing, or of another kind. Errors in its content are raised when records are read.
    """
    kind = kind_of_file(path)
    readers: dict[Kind, Callable[[Path], Iterator[Record]]] = {
        "json": _json,
        "csv": lambda file: _delimited(file, None),
        "tsv": lambda file: _delimited(file, "\t"),
        "text": _lines,
        "parquet": lambda file: _columnar(file, "parquet"),
        "arrow": lambda file: _columnar(file, "arrow"),
    }
    return Table(shown_path(path), lambda: readers[kind](path))


def split_table(name: str, split: Any) -> Table:
    """The table of a split that ``datasets`` opened. Class labels become their names; images and audio are dropped."""

    def read() -> Iterator[Record]:
        with library_errors(name):
            yield from _plain_records(split)

    return Table(name, read)


def _json(path: Path) -> Iterator[Record]:
    """The records of JSON lines, or of one JSON array of objects."""
    with unpacked(path) as handle:
        if not handle.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_lines(handle, path)
            return
        rows = parse_json(handle.read(), shown_path(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{shown_path(path)}: row {number} is {shown(row)}, not a JSON object with fields")
        yield row


def _json_lines(handle: io.BufferedReader, path: Path) -> Iterator[Record]:
    first = True
    try:
        for row in iter_jsonl(handle, path):
            yield row
            first = False
    except DataError as broken:
        if first and (fields := _single_object(path)) is not None:
            raise DataError(
                f"{shown_path(path)} is one JSON object ({listed(fields)}), not rows", hint="write one object a line, or a list of objects: [{…}, {…}]"
            ) from broken
        raise


def _single_object(path: Path) -> list[str] | None:
    """The fields of a file that consists of one JSON object; None for any other file."""
    with unpacked(path) as handle:
        try:
            value = parse_json(handle.read(), shown_path(path))
        except DataError:
            return None
    return list(value) if isinstance(value, dict) else None


def _delimited(path: Path, delimiter: str | None) -> Iterator[Record]:
    """The records of a CSV file with a line of column names. Every field is a text; an empty field is an empty text."""
    csv.field_size_limit(_LONGEST_FIELD)
    name = shown_path(path)
    with unpacked(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
        reader: Any = None
        try:
            head = next((line for line in text if line.strip()), "")
            reader = csv.reader(chain([head], text), delimiter=delimiter or _delimiter(head), strict=True)
            columns: list[str] = next(reader, [])
            _check_columns(columns, name)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(columns):
                    raise DataError(
                        f"{name}:{reader.line_num}: {len(row)} fields, and there are {len(columns)} columns",
                        hint='put fields that contain the delimiter in "quotes"',
                    )
                yield dict(zip(columns, row, strict=True))
        except UnicodeDecodeError as broken:
            raise DataError(f"{name} is not UTF-8 text (after line {reader.line_num if reader else 0})", hint="save it as UTF-8") from broken
        except csv.Error as broken:
            raise DataError(f"{name}:{reader.line_num if reader else 1} is not valid CSV: {broken}") from broken


def _delimiter(head: str) -> str:
    """The delimiter that occurs most often in the line of column names outside of quotes; the comma if there is none."""
    bare = "".join(head.split('"')[::2])
    return max(",;\t|", key=bare.count)


def _check_columns(columns: list[str], name: str) -> None:
    repeated = next((column for index, column in enumerate(columns) if column in columns[:index]), None)
    if repeated is not None:
        raise DataError(f"{name} has two columns called {shown(repeated)}", hint="its first line must name the columns, each once")


def _lines(path: Path) -> Iterator[Record]:
    """The records of a text file: every line that is not blank is a record with the column ``text``."""
    with unpacked(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig")
        number = 0
        try:
            for line in text:
                number += 1
                if line.strip():
                    yield {"text": line.removesuffix("\n")}
        except UnicodeDecodeError as broken:
            raise DataError(f"{shown_path(path)} is not UTF-8 text (after line {number})", hint="save it as UTF-8") from broken


def _columnar(path: Path, builder: str) -> Iterator[Record]:
    """The records of a Parquet or Arrow file, streamed by ``datasets``."""
    import datasets

    with library_errors(shown_path(path)), plain_file(path) as plain:
        yield from _plain_records(datasets.load_dataset(builder, data_files=str(plain), split="train", streaming=True))


def _plain_records(split: Any) -> Iterator[Record]:
    """The records of a ``datasets`` split, with names of class labels and without images and audio."""
    from datasets import ClassLabel

    features = dict(split.features or {})
    media = [name for name, feature in features.items() if hasattr(feature, "decode_example")]
    labels = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for record in split.remove_columns(media) if media else split:
        for name, names in labels.items():
            number = record[name]
            if isinstance(number, int) and 0 <= number < len(names):
                record[name] = names[number]
        yield record


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Translate the errors of ``datasets`` about a broken file into DataError."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError, pyarrow.ArrowException, DatasetsError) as broken:
        raise DataError(f"{name} cannot be read: {first_line(broken)}") from broken
