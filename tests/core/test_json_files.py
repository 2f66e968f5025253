"""JSON and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_core.errors import DataError
from meteora_core.json_files import decode_json, parse_json, read_json, read_jsonl, read_object, write_jsonl


def test_json_beyond_the_readers_limits(tmp_path) -> None:
    for text in ("9" * 5000, "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=r"x\.json cannot be read as JSON"):
            read_json(tmp_path / "x.json")


def test_json_lines(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"a": "ü\n\u2028"}, {"a": "lone \ud800"}]
    assert write_jsonl(path, rows) == 2
    assert list(read_jsonl(path)) == rows
    for text, message in [
        ('{"a": 1}\n{"a": 1\n', r"x\.jsonl:2:\d+ is not valid JSON"),
        ("[1]\n", r"x\.jsonl:1 is not a JSON object"),
        ('{"b": 1}\n', r"x\.jsonl:1 has no field 'a'"),
        ('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", r"x\.jsonl:2 cannot be read as JSON"),
        ('{"a": ' + "[" * 100_000 + "\n", r"x\.jsonl:1 cannot be read as JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_jsonl(path, required=("a",)))
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1:\d+ is not UTF-8"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "none"))


def test_json_errors_name_line_and_column(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n "a": ]\n')
    with pytest.raises(DataError, match=r"x\.json:2:7"):
        read_json(path)


@pytest.mark.parametrize(
    "document", ["NaN", '{"a": -Infinity}', "[1e400]", '{"a": {"b": 1, "b": 2}}', "1" * 5000, "[" * 100_000, "-" + "9" * 5000], ids=lambda text: text[:12]
)
def test_json_outside_the_standard_is_refused(tmp_path: Path, document: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(document)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(file)
    file.write_text(json.dumps({"prompt": "a"}) + '\n{"prompt": ' + document + "}\n")
    with pytest.raises(DataError, match=r"x\.json:2 cannot be read as JSON"):
        list(read_jsonl(file))


def test_large_numbers_that_can_be_held_stay() -> None:
    assert decode_json('{"a": 123456789012345678901234567890, "b": 1e300, "c": -0.0}') == {"a": 123456789012345678901234567890, "b": 1e300, "c": 0.0}


def test_only_the_named_key_may_hold_numbers_that_are_not_finite(tmp_path: Path) -> None:
    raw = b'{"training": {"loss": NaN, "parts": [1.5, -Infinity]}, "top_k": 2}'
    assert parse_json(raw, "x", nullable="training") == {"training": {"loss": None, "parts": [1.5, None]}, "top_k": 2}
    assert parse_json(raw, "x", nullable="*") == parse_json(raw, "x", nullable="training")
    for document in (b'{"training": {}, "top_k": [NaN]}', b"[NaN]", b"NaN"):
        with pytest.raises(DataError, match="x cannot be read as JSON: nan is not a JSON number"):
            parse_json(document, "x", nullable="training")
    (tmp_path / "x.json").write_bytes(b"[1]")
    with pytest.raises(DataError, match=r"x\.json is not a JSON object"):
        read_object(tmp_path / "x.json")
