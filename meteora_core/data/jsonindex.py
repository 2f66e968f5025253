"""Index of a large BIG-bench JSON file, built in bounded memory.

The file is read once, in pieces. The index keeps all fields except ``examples``, and the position of every example in the file, so that examples can be
read again one by one in any order. Memory grows with the number of examples (16 bytes each, and about 80 during the search for duplicates), not with their
length.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from meteora_core.errors import DataError
from meteora_core.json_files import STRICT_DECODER, decode_json
from meteora_core.reading import open_regular, read_errors

_PIECE = 1 << 20
_SPACE = " \t\n\r"


@dataclass(frozen=True)
class IndexedFile:
    """The index of a file, as :func:`index_file` returns it.

    Args:
        path: Path of the file.
        sha256: SHA-256 of the file.
        fields: Top-level fields except ``examples``.
        starts, ends: Position in bytes of the start of each distinct example, and of its end (exclusive), in the order of the file.
        total: Number of examples, including duplicates.
        has_examples: Whether the file has a field ``examples``; a task with sub-tasks has none.
    """

    path: Path
    sha256: str
    fields: dict[str, Any]
    starts: Sequence[int]
    ends: Sequence[int]
    total: int
    has_examples: bool

    def __len__(self) -> int:
        return len(self.starts)


class ExampleReader:
    """Reader of an indexed file's examples by number.

    Args:
        index: Index of the file.
    """

    def __init__(self, index: IndexedFile) -> None:
        self.index = index
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> ExampleReader:
        self._handle = open_regular(self.index.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.close()

    def __getitem__(self, number: int) -> Any:
        assert self._handle is not None
        start, end = self.index.starts[number], self.index.ends[number]
        self._handle.seek(start)
        try:
            return decode_json(self._handle.read(end - start).decode())
        except ValueError as changed:
            raise DataError(f"{self.index.path} changed while it was read", hint="run the command again") from changed

    def place(self, number: int) -> str:
        """The position of an example as ``file:line:column``, for error messages."""
        with open_regular(self.index.path) as handle:
            before = handle.read(self.index.starts[number])
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", errors="replace")) + 1
        return f"{self.index.path}:{line}:{column}"


def index_file(path: Path) -> IndexedFile:
    """Index a BIG-bench JSON file. Of duplicate examples (the same JSON in the same order of keys), only the first is kept.

    Raises:
        DataError: The file is missing, is not UTF-8, or is not a JSON object; the message names file, line and column.
    """
    fields: dict[str, Any] = {}
    starts, ends = array("q"), array("q")
    total, has_examples = 0, False
    seen: set[bytes] = set()
    with open_regular(path) as handle, read_errors(path):
        window = _Window(path, handle)
        for key in window.members():
            if key != "examples":
                fields[key] = window.value()
                continue
            has_examples = True
            total = 0
            seen.clear()
            del starts[:], ends[:]
            for _ in window.elements():
                example = window.value()
                total += 1
                digest = hashlib.blake2b(json.dumps(example).encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    starts.append(window.value_start)
                    ends.append(window.byte)
        window.finish()
    return IndexedFile(path, window.sha256.hexdigest(), fields, starts, ends, total, has_examples)


class _Window:
    """A piece of the file's text that moves forward, with its position in bytes and its line and column."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path = path
        self.handle = handle
        self.sha256 = hashlib.sha256()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0
        self.byte = 0
        self.value_start = 0
        self.line = 1
        self.column = 1
        self.read_bytes = 0
        self.ended = False

    def members(self) -> Iterator[str]:
        """The keys of the object at the current position; the caller must read each value before it asks for the next key."""
        self._take("{", "a JSON object is expected")
        yield from self._list("}", keys=True)

    def elements(self) -> Iterator[str]:
        """An empty text for each element of the array at the current position; the caller must read each value before it asks for the next element."""
        self._take("[", "'examples' is not a list")
        yield from self._list("]", keys=False)

    def value(self) -> Any:
        """Decode the value at the current position and move to its end; ``value_start`` becomes the position of its first byte."""
        self._skip_space()
        self.value_start = self.byte
        size = _PIECE
        while True:
            try:
                found, end = STRICT_DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as broken:
                if self.ended:
                    raise self._error(broken.msg, broken.pos) from broken
            except ValueError as broken:
                raise self._error(str(broken), self.at) from broken
            except RecursionError as deep:
                raise self._error("nested too deeply", self.at) from deep
            else:
                if end < len(self.text) or self.ended:
                    self._move(end)
                    return found
            self._read(size)
            size *= 2

    def finish(self) -> None:
        """Check that only white space is left."""
        if self._peek():
            raise self._error("extra data", self.at)

    def _list(self, close: str, *, keys: bool) -> Iterator[str]:
        first = True
        while True:
            here = self._peek()
            if here == close:
                self._move(self.at + 1)
                return
            if not first:
                self._take(",", f"',' or '{close}' is expected")
                if self._peek() == close:
                    raise self._error("a comma before the end", self.at)
            first = False
            if not keys:
                yield ""
                continue
            if self._peek() != '"':
                raise self._error("a name in double quotes is expected", self.at)
            key = self.value()
            self._take(":", "':' is expected")
            yield key

    def _take(self, wanted: str, otherwise: str) -> None:
        if self._peek() != wanted:
            raise self._error(otherwise if self.text[self.at : self.at + 1] else "the file ends too early", self.at)
        self._move(self.at + 1)

    def _peek(self) -> str:
        self._skip_space()
        return self.text[self.at : self.at + 1]

    def _skip_space(self) -> None:
        while True:
            end = self.at
            text, length = self.text, len(self.text)
            while end < length and text[end] in _SPACE:
                end += 1
            self._move(end)
            if end < length or self.ended:
                return
            self._read(_PIECE)

    def _move(self, end: int) -> None:
        if end == self.at:
            return
        passed = self.text[self.at : end]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        lines = passed.count("\n")
        self.line += lines
        self.column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        self.at = end

    def _read(self, size: int) -> None:
        raw = self.handle.read(size)
        if self.read_bytes == 0 and raw.startswith(codecs.BOM_UTF8):
            self.byte = len(codecs.BOM_UTF8)
        self.read_bytes += len(raw)
        self.sha256.update(raw)
        self.ended = not raw
        try:
            more = self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as broken:
            place = self.read_bytes - len(raw) + broken.start
            raise DataError(f"{self.path} is not UTF-8 text (near byte {place})") from broken
        self.text = self.text[self.at :] + more
        self.at = 0

    def _error(self, message: str, position: int) -> DataError:
        passed = self.text[self.at : position]
        lines = passed.count("\n")
        column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        return DataError(f"{self.path}:{self.line + lines}:{column} is not valid JSON: {message}")
