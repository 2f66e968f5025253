"""The streaming index against Python's JSON reader."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data import jsonindex
from meteora_core.data.jsonindex import ExampleReader, index_file
from meteora_core.errors import DataError

EXAMPLES: list[Any] = [
    {"input": "ä \u2028 \U0001f600", "target": ["x", "y"]},
    {"input": 'quotes " and \\ back', "target_scores": {"a": 1, "b": 0.5}},
    {"target_scores": {"a": 1, "b": 0.5}, "input": 'quotes " and \\ back'},
    {"input": "\ud83d half", "target": -1.5e3},
    {"input": "", "target": None},
]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escaped", [True, False])
def test_any_piece_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None, escaped: bool) -> None:
    monkeypatch.setattr(jsonindex, "_PIECE", piece)
    value = {"name": "tâsk", "number": 12, "examples": [*EXAMPLES, EXAMPLES[0]], "after": {"x": [1, 2]}, "last": 345}
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    path = tmp_path / "task.json"
    raw = text.encode("utf-8", errors="strict" if escaped else "replace")
    path.write_bytes(raw)
    wanted = json.loads(raw)
    index = index_file(path)
    assert index.fields == {key: item for key, item in wanted.items() if key != "examples"}
    assert (index.total, len(index), index.has_examples) == (6, 5, True)
    assert index.sha256 == hashlib.sha256(raw).hexdigest()
    with ExampleReader(index) as reader:
        for number in (3, 0, 4, 2, 1):
            assert reader[number] == wanted["examples"][number]
            line = raw[: index.starts[number]].count(b"\n") + 1
            assert reader.place(number).startswith(f"{path}:{line}:")


def test_duplicates_are_the_same_json_in_the_same_order(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text('{"examples": [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a":1,"b":2}, {"a": 1.0, "b": 2}, {"a": "\\u0041"}, {"a": "A"}]}')
    index = index_file(path)
    with ExampleReader(index) as reader:
        assert [reader[i] for i in range(len(index))] == [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1.0, "b": 2}, {"a": "A"}]


def test_byte_order_mark_and_no_examples(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_bytes(b'\xef\xbb\xbf{"examples": [ {"a": 1} ]}')
    index = index_file(path)
    with ExampleReader(index) as reader:
        assert reader[0] == {"a": 1}
    path.write_text(' {"name": "container"}\n')
    assert not index_file(path).has_examples
    path.write_text("{}")
    assert index_file(path).fields == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1:1 .*ends too early"),
        ("[1]", r":1:1 .*object is expected"),
        ('{"a": 1,\n "b" 2}', r":2:6 .*':' is expected"),
        ('{"a": 1\n "b": 2}', r":2:2 .*',' or '}' is expected"),
        ('{"examples": {"a": 1}}', r":1:14 .*not a list"),
        ('{"examples": [{"a": 1},\n {"a": }]}', r":2:8 .*Expecting value"),
        ('{"examples": [{"a": 1} {"a": 2}]}', r":1:24 .*',' or '\]' is expected"),
        ('{"examples": [{"a": 1},]}', r":1:24 .*comma before the end"),
        ('{"examples": [{"a": 1}', r":1:23 .*ends too early"),
        ('{"a": 1} x', r":1:10 .*extra data"),
        ("{a: 1}", r":1:2 .*double quotes"),
        ('{"a": ' + "[" * 100_000, r":1:7 .*nested too deeply"),
    ],
)
def test_broken_json_is_placed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        index_file(path)
    assert str(path) in caught.value.message


def test_missing_and_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        index_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        index_file(tmp_path / "bad.json")
    (tmp_path / "cut.json").write_bytes('{"a": "ü'.encode()[:-1])
    with pytest.raises(DataError, match="not UTF-8"):
        index_file(tmp_path / "cut.json")


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    with open(path, "w", encoding="utf-8") as handle:
        handle.write('{"examples": [')
        for number in range(400):
            handle.write(("," if number else "") + json.dumps({"input": f"{number} " + "word " * 20_000, "target": "x"}))
        handle.write("]}")
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    index = index_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == 400
    assert peak < 12_000_000


def test_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text('{"examples": [{"a": 1}]}')
    index = index_file(path)
    path.write_text("{}")
    with ExampleReader(index) as reader, pytest.raises(DataError, match="changed while it was read"):
        reader[0]
