"""The layouts of the local source, and the conversion of records to rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data.extract import NotHere
from meteora_core.data.records import divide, fill, record_to_row
from meteora_core.data.rows import Row
from meteora_core.data.sources import candidates, extract
from meteora_core.data.tasks import TASKS, get_task
from meteora_core.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("task", "record", "row"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "#### 2"}, Row("[INST] 1+1? [/INST]\n", "#### 2")),
        ("alpaca", {"instruction": "Sum up.", "input": "a {b}", "output": "ab"}, Row("[INST] Sum up.\na {b} [/INST]\n", "ab")),
        ("alpaca", {"instruction": "Say hi.", "input": "", "output": "hi"}, Row("[INST] Say hi. [/INST]\n", "hi")),
        (
            "cnn_dailymail",
            {"article": "A.", "highlights": "B.", "id": 1},
            Row("[INST] Generate a summarization of the news article.\nA. [/INST]\n", "B."),
        ),
        (
            "news_commentary_de",
            {"translation": {"de": "Ja", "en": "Yes"}},
            Row("[INST] Den folgenden Text ins Englische übersetzen.\nJa [/INST]\n", "Yes"),
        ),
        (
            "news_commentary_es",
            {"id": "0", "translation": {"en": "Yes", "es": "Sí"}},
            Row("[INST] Traducir las siguientes frases al inglés.\nSí [/INST]\n", "Yes"),
        ),
        (
            "news_commentary_it",
            {"translation": {"en": "Yes", "it": "Sì"}},
            Row("[INST] Tradurre le seguenti frasi in inglese.\nSì [/INST]\n", "Yes"),
        ),
        (
            "strategyqa",
            {"idx": 1, "inputs": "Q: Is it?\nA:", "targets": ["Yes.", "No."], "multiple_choice_targets": [], "multiple_choice_scores": []},
            Row("[INST] Q: Is it?\nA: [/INST]\n", "Yes."),
        ),
        (
            "tracking_shuffled_objects",
            {"inputs": "Who?", "targets": ["B."], "multiple_choice_targets": ["A.", "B."], "multiple_choice_scores": [0, 1]},
            Row("[INST] Who?\nchoice: A.\nchoice: B.\n [/INST]\n", "B."),
        ),
        ("winowhy", {"prompt": "as it is", "response": "so"}, Row("as it is", "so")),
    ],
)
def test_records(task: str, record: dict[str, Any], row: Row) -> None:
    assert record_to_row(TASKS[task], record) == row


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("gsm8k", {"question": "x", "output": "y"}, "no field 'answer'; there are: question, output"),
        ("gsm8k", {"question": None, "answer": "y"}, "field 'question' is null"),
        ("news_commentary_de", {"de": "x", "en": "y"}, "no field 'translation'"),
        ("winowhy", {"inputs": "x"}, "no field 'targets'"),
        ("winowhy", {"inputs": "x", "targets": []}, "empty list"),
        ("winowhy", {"inputs": "x", "targets": ["y"], "multiple_choice_targets": "z"}, "is not a list"),
        ("winowhy", ["x"], "not an object"),
    ],
)
def test_broken_records(task: str, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_to_row(TASKS[task], record)


def test_fill() -> None:
    assert fill("{{{a}}} {b}", {"a": "{x}", "b": 2}) == "{{x}} 2"


def test_divide_is_the_authors_split() -> None:
    rows = [Row(str(i), "") for i in range(999)]
    order = list(range(999))
    random.seed(42)
    random.shuffle(order)
    train, test = divide(rows)
    assert [int(row.prompt) for row in test] == order[:199]
    assert [int(row.prompt) for row in train] == order[199:]


@pytest.mark.parametrize("below", ["", "bigbench/benchmark_tasks"])
def test_repository_layout(repository: Path, below: str) -> None:
    raw = extract(TASKS["strategyqa"], "local", repository / below)
    assert raw.counts == {"train": 80, "test": 20}
    assert raw.duplicates_dropped == 1
    assert raw.origin["files"][0]["path"] == "strategyqa/task.json"
    assert len(list(raw.rows("test"))) == 20


def test_hub_export_equals_the_repository(repository: Path, tmp_path: Path, write_lines: Any) -> None:
    """The hub's exported rows and BIG-bench's file must give the same dataset."""
    from meteora_core.data.bigbench import ExampleReader, Style, format_example, split_order, task_files

    task = TASKS["logical_deduction"]
    exported: dict[str, list[Any]] = {"train": [], "validation": []}
    for index in task_files(repository / "bigbench" / "benchmark_tasks" / task.name):
        with ExampleReader(index) as reader:
            for name, numbers in zip(exported, split_order(len(index)), strict=True):
                for number in numbers:
                    example = format_example(reader[number], Style.of(index))
                    exported[name].append({"idx": number, "inputs": example.inputs, "targets": [example.target], "multiple_choice_targets": example.choices})
    for name, rows in exported.items():
        write_lines(tmp_path / "hub" / task.name / f"{name}.jsonl", rows)
    ours, theirs = extract(task, "local", repository), extract(task, "local", tmp_path / "hub")
    for split in ("train", "test"):
        assert list(ours.rows(split)) == list(theirs.rows(split))
    assert "validation" in theirs.rule


def test_raw_rows(tmp_path: Path, write_lines: Any) -> None:
    write_lines(tmp_path / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(10)])
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [{"question": "t", "answer": "b"}])
    raw = extract(TASKS["gsm8k"], "local", tmp_path)
    assert list(raw.rows("test")) == [Row("[INST] t [/INST]\n", "b")]
    assert [row.prompt for row in raw.rows("train")] == [f"[INST] q{i} [/INST]\n" for i in range(10)]
    write_lines(tmp_path / "alpaca" / "train.jsonl", [{"instruction": f"i{i}", "input": "", "output": "o"} for i in range(50)])
    divided = extract(TASKS["alpaca"], "local", tmp_path)
    assert divided.counts == {"train": 40, "test": 10}
    assert divided.seed == 42


def test_finished_composite(tmp_path: Path, write_lines: Any) -> None:
    write_lines(tmp_path / "composite_3" / "test.jsonl", [{"prompt": "p", "response": "a@@@@\nb@@@@\nc"}])
    raw = extract(get_task("composite_3"), "local", tmp_path)
    assert raw.splits == ("test",)
    assert list(raw.rows("test")) == [Row("p", "a@@@@\nb@@@@\nc")]


def test_problems(tmp_path: Path, write_lines: Any) -> None:
    with pytest.raises(NotHere, match="no such folder"):
        extract(TASKS["gsm8k"], "local", tmp_path / "none")
    with pytest.raises(NotHere, match="no folder gsm8k"):
        extract(TASKS["gsm8k"], "local", tmp_path)
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(DataError, match=r"neither task\.json nor train\.jsonl"):
        extract(TASKS["gsm8k"], "local", tmp_path)
    write_lines(tmp_path / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [])
    with pytest.raises(DataError, match=r"train\.jsonl: row 2: no field 'answer'"):
        list(extract(TASKS["gsm8k"], "local", tmp_path).rows("train"))


def test_candidates(tmp_path: Path) -> None:
    assert candidates(TASKS["winowhy"], "auto", tmp_path) == ["local", "pypi", "hub", "authors"]
    assert candidates(TASKS["winowhy"]) == ["pypi", "hub", "authors"]
    assert candidates(TASKS["gsm8k"]) == ["hub", "authors"]
    for task, source, message in (
        ("winowhy", "hubb", "unknown source"),
        ("winowhy", "local", "needs a folder"),
        ("gsm8k", "pypi", "not a BIG-bench task"),
        ("composite_3", "auto", "made of other tasks"),
    ):
        with pytest.raises(UsageError, match=message):
            candidates(get_task(task), source)


def test_broken_data_is_not_passed_over(repository: Path) -> None:
    path = repository / "bigbench" / "benchmark_tasks" / "strategyqa" / "task.json"
    path.write_text('{"examples": [')
    with pytest.raises(DataError, match=r"task\.json:1:15"):
        extract(TASKS["strategyqa"], "auto", repository)
