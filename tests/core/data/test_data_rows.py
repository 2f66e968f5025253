"""Reading of built datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meteora_core.data.rows import Row, available_tasks, build_commands, read_rows
from meteora_core.data.tasks import TASKS, Files
from meteora_core.errors import DataError


def put(folder: Path, text: str, split: str = "test") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def test_read(tmp_path: Path) -> None:
    put(tmp_path / "a", '{"prompt": "p\u2028ü", "response": "r"}\n\n{"prompt": "q", "response": "", "more": 1}\n')
    assert read_rows(tmp_path, "a", "test") == [Row("p\u2028ü", "r"), Row("q", "")]
    assert read_rows(tmp_path, "a", "test", limit=1) == [Row("p\u2028ü", "r")]
    assert read_rows(tmp_path, "a", "test", limit=0) == []


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("gsm8k", "meteora data build --task gsm8k"),
        ("composite_3", "meteora data composite --n 3"),
        ("composite_99", "meteora data add composite_99 --train FILE"),
        ("pirate", "meteora data add pirate --train FILE"),
    ],
)
def test_missing(tmp_path: Path, task: str, command: str) -> None:
    with pytest.raises(DataError, match="no test rows") as caught:
        read_rows(tmp_path, task, "test")
    assert command in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"prompt": "p", "response": "r"}\n{"prompt": "p",}\n', r"test\.jsonl:2:1[567]"),
        ('{"prompt": "p"}\n', r"test\.jsonl:1 has no field 'response'"),
        ("[1]\n", r"test\.jsonl:1 is not a JSON object"),
        ('{"prompt": 1, "response": "r"}\n', "'prompt' is not a text"),
        ("\n", "has no rows"),
    ],
)
def test_broken(tmp_path: Path, text: str, place: str) -> None:
    put(tmp_path / "a", text)
    with pytest.raises(DataError, match=place):
        read_rows(tmp_path, "a", "test")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_bytes(b'{"prompt": "\xff", "response": ""}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1:13 is not UTF-8"):
        read_rows(tmp_path, "a", "train")


def test_available(tmp_path: Path) -> None:
    assert available_tasks(tmp_path / "none") == []
    put(tmp_path / "b", "", "train")
    put(tmp_path / "a", "")
    put(tmp_path / ".b.x.tmp", "")
    (tmp_path / "c").mkdir()
    assert available_tasks(tmp_path) == ["a", "b"]


def test_commands_for_several_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = replace(TASKS["gsm8k"], name="declared", source=Files(tmp_path / "rows.jsonl", None))
    added = replace(declared, name="added", source=Files(tmp_path / "added" / "train.jsonl", None))
    monkeypatch.setitem(TASKS, "declared", declared)
    monkeypatch.setitem(TASKS, "added", added)
    assert build_commands(["pirate", "gsm8k", "declared", "added", "gsm8k", "composite_3"], tmp_path) == [
        f"meteora data build --task gsm8k,declared --out {tmp_path}",
        f"meteora data add pirate --train FILE --out {tmp_path}",
        f"meteora data add added --train FILE --out {tmp_path}",
        f"meteora data composite --n 3 --out {tmp_path}",
    ]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "null", "[]", "{}", "true", "9" * 5000, '"a", "prompt": "b"', "[" * 5000], ids=lambda text: text[:12]
)
def test_prompts_that_are_no_text(tmp_path: Path, value: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test.jsonl").write_text('{"prompt": ' + value + ', "response": "r"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl") as caught:
        read_rows(tmp_path, "a", "test")
    assert len(caught.value.message) < 400
