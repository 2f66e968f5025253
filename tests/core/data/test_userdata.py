"""The user's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meteora_core.data import tasks
from meteora_core.data.build import build_task
from meteora_core.data.composite import CompositeRequest, build_composite
from meteora_core.data.formats.reading import Reading
from meteora_core.data.frames import Frame
from meteora_core.data.manifest import read_manifest
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import get_task
from meteora_core.data.userdata import add_task, own_task, preview, register_built, register_settings, task_in
from meteora_core.errors import DataError, UsageError


def test_finished_rows(tmp_path: Path, write_lines: Any) -> None:
    train = write_lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(10)])
    test = write_lines(tmp_path / "b.jsonl", [{"prompt": "t", "response": "s"}])
    manifest = add_task(own_task("mine", train=train, test=test, metric="contains", max_new_tokens=9), tmp_path / "data")
    assert (manifest.rows, manifest.metric, manifest.max_new_tokens) == ({"train": 10, "test": 1}, "contains", 9)
    assert read_rows(tmp_path / "data", "mine", "test") == [Row("t", "s")]
    assert str(tmp_path) not in str(manifest)


def test_templates_and_a_split(tmp_path: Path, write_lines: Any) -> None:
    train = write_lines(tmp_path / "a.jsonl", [{"q": f"p{i}", "n": i} for i in range(10)])
    task = own_task("mine", train=train, reading=Reading(template="Say {q}\n", target="{n}"))
    found = preview(task, tmp_path / "data")
    assert (found.rows, found.columns, found.frame, found.example) == (
        {"train": 8, "test": 2},
        "your template (q, n)",
        Frame("Say ", "\n"),
        Row("Say p0\n", "0"),
    )
    assert not (tmp_path / "data").exists()
    add_task(task, tmp_path / "data")
    rows = [row for split in ("train", "test") for row in read_rows(tmp_path / "data", "mine", split)]
    assert sorted(rows, key=lambda row: row.prompt) == [Row(f"Say p{i}\n", str(i)) for i in range(10)]


def test_built_tasks_are_known_in_a_later_process(tmp_path: Path, write_lines: Any) -> None:
    for name in ("one", "two"):
        train = write_lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}", "response": f"r{i}"} for i in range(60)])
        add_task(own_task(name, train=train, metric="text", max_new_tokens=5), tmp_path)
    for name in ("one", "two"):
        del tasks.TASKS[name]
    with pytest.raises(UsageError):
        get_task("one")
    assert (task_in(tmp_path, "one").metric, task_in(tmp_path, "one").max_new_tokens) == ("text", 5)
    manifest = build_composite(tmp_path, CompositeRequest(tasks=["two", "one"]))
    assert manifest.members == ("two", "one")
    assert {task.name for task in register_built(tmp_path)} == {"one", "two", "composite_2_custom"}
    assert get_task("one").metric == "text"


def test_a_dataset_is_not_built_from_its_own_rows(tmp_path: Path, write_lines: Any) -> None:
    """Otherwise changed rows would count as correct, and a smaller build as complete."""
    data = tmp_path / "data"
    before = add_task(own_task("kept", train=write_lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(40)])), data)
    tasks.TASKS.pop("kept")  # a later process does not know the task
    register_built(data)
    assert build_task("kept", data) == before
    for options in ({"force": True}, {"max_train": 3}, {"max_test": 3}):
        with pytest.raises(DataError, match="cannot be built again") as caught:
            build_task("kept", data, **options)
        assert "meteora data add kept --train FILE" in str(caught.value.hint)
    train = data / "kept" / "train.jsonl"
    train.write_text(train.read_text().replace('"r"', '"HACKED"'))
    with pytest.raises(DataError, match="cannot be built again"):
        build_task("kept", data)
    assert read_manifest(data / "kept") == before
    assert add_task(own_task("kept", train=tmp_path / "a.jsonl"), data).rows == before.rows
    assert "HACKED" not in train.read_text()


def test_settings(tmp_path: Path, write_lines: Any) -> None:
    from meteora_core.settings import UserTask

    train = write_lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(10)])
    register_settings({"mine": UserTask(train=train, test=train, metric="bleu", max_new_tokens=None), "other": {"train": train}})  # type: ignore[call-arg]
    assert get_task("mine").metric == "bleu"
    assert get_task("other").metric == "exact"
    assert build_task("mine", tmp_path / "data").rows == {"train": 10, "test": 10}
    for declared, message in (({"x": {"metric": "exact"}}, "no train file"), ({"x": {"train": "a", "metric": "exactly"}}, "unknown metric")):
        with pytest.raises(UsageError, match=message):
            register_settings(declared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "contain"}, "unknown metric"),
        ({"metric": "composite"}, "unknown metric"),
        ({"reading": Reading(template="{a")}, "is broken"),
        ({"reading": Reading(target="{a")}, "is broken"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_descriptions(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        own_task("mine", train=tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize("name", ["gsm8k", "composite_3", "a/b", ""])
def test_wrong_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        own_task(name, train=tmp_path / "a.jsonl")


def test_wrong_files(tmp_path: Path, write_lines: Any) -> None:
    with pytest.raises(DataError, match="no such file"):
        add_task(own_task("mine", train=tmp_path / "none.jsonl"), tmp_path)
    train = write_lines(tmp_path / "a.jsonl", [{"question": "q"}])
    with pytest.raises(DataError, match="the columns fit no known format; there are: question"):
        add_task(own_task("mine", train=train), tmp_path)
    with pytest.raises(DataError, match="the test split of mine is empty"):
        preview(own_task("mine", train=write_lines(tmp_path / "b.jsonl", [{"prompt": "p", "response": "r"}])), tmp_path)
    assert read_manifest(tmp_path / "mine") is None
