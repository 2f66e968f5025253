"""Building, manifests and verification: written files, refusals, and the state after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data import writer
from meteora_core.data.build import BuildRequest, build_task, build_tasks
from meteora_core.data.catalog import list_tasks, plan_build, verify
from meteora_core.data.manifest import read_manifest
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.writer import row_line
from meteora_core.errors import DataError, MeteoraError, StorageError, UsageError

THREE = ["logical_deduction", "question_selection", "strategyqa"]


class Notes:
    """A progress that records its reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Any:
        progress = self

        class Bar:
            def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
                progress.done[title] = progress.done.get(title, 0) + advance

        yield Bar()

    def note(self, message: str) -> None:
        self.notes.append(message)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_build_and_manifest(repository: Path, tmp_path: Path) -> None:
    progress = Notes()
    manifest = build_task("strategyqa", tmp_path, raw_dir=repository, progress=progress)
    assert read_manifest(tmp_path / "strategyqa") == manifest
    assert manifest.rows == {"train": 80, "test": 20}
    assert manifest.metric == "yes_no_text"
    assert manifest.seed == 42
    assert manifest.duplicates == {"dropped": 1, "test_prompts_in_train": 0}
    assert manifest.source["files"][0]["examples"] == 101
    assert progress.done == {"building strategyqa": 100}
    assert len(read_rows(tmp_path, "strategyqa", "test")) == 20
    assert str(tmp_path) not in json.dumps(manifest.to_json())
    assert all(report.ok for report in verify(tmp_path))


def test_two_builds_are_equal_with_any_number_of_jobs(repository: Path, tmp_path: Path) -> None:
    one = build_tasks(THREE, tmp_path / "one", BuildRequest(raw_dir=repository))
    two = build_tasks([*THREE, "strategyqa"], tmp_path / "two", BuildRequest(raw_dir=repository), jobs=2)
    assert one == two
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_limits(repository: Path, tmp_path: Path) -> None:
    whole = build_task("strategyqa", tmp_path / "a", raw_dir=repository)
    cut = build_task("strategyqa", tmp_path / "b", raw_dir=repository, max_train=7, max_test=3)
    assert (whole.rows, cut.rows) == ({"train": 80, "test": 20}, {"train": 7, "test": 3})
    assert read_rows(tmp_path / "b", "strategyqa", "train") == read_rows(tmp_path / "a", "strategyqa", "train")[:7]
    progress = Notes()
    build_task("strategyqa", tmp_path / "b", raw_dir=repository, max_test=500, progress=progress)
    assert progress.notes == ["strategyqa: the source has 20 test rows, fewer than the 500 that were asked for"]
    with pytest.raises(UsageError, match="max_train must be at least 1"):
        build_task("strategyqa", tmp_path / "b", raw_dir=repository, max_train=0)


def test_an_intact_build_is_kept(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meteora_core.data import build

    manifest = build_task("strategyqa", tmp_path, raw_dir=repository)
    monkeypatch.setattr(build, "extract", None)
    assert build_task("strategyqa", tmp_path) == manifest
    for options in ({"force": True}, {"max_test": 5}, {"source": "pypi"}, {"raw_dir": repository}):
        with pytest.raises(TypeError):
            build_task("strategyqa", tmp_path, **options)  # type: ignore[arg-type]
    (tmp_path / "strategyqa" / "test.jsonl").write_text("")
    with pytest.raises(TypeError):
        build_task("strategyqa", tmp_path)


def test_prompts_in_both_splits_are_counted(tmp_path: Path, write_lines: Any) -> None:
    write_lines(tmp_path / "raw" / "gsm8k" / "train.jsonl", [{"question": f"q{i % 3}", "answer": str(i)} for i in range(6)])
    write_lines(tmp_path / "raw" / "gsm8k" / "test.jsonl", [{"question": f"q{i}", "answer": "x"} for i in (1, 2, 7)])
    assert build_task("gsm8k", tmp_path / "out", raw_dir=tmp_path / "raw").duplicates == {"dropped": 0, "test_prompts_in_train": 2}


def test_empty_split_leaves_nothing(tmp_path: Path, write_lines: Any) -> None:
    write_lines(tmp_path / "raw" / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "a"}])
    write_lines(tmp_path / "raw" / "gsm8k" / "test.jsonl", [])
    with pytest.raises(DataError, match="the test split of gsm8k is empty"):
        build_task("gsm8k", tmp_path / "out", raw_dir=tmp_path / "raw")
    assert not (tmp_path / "out").exists()


def test_broken_rows_leave_the_old_dataset(tmp_path: Path, write_lines: Any) -> None:
    train = write_lines(tmp_path / "raw" / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "a"}] * 5)
    build_task("gsm8k", tmp_path / "out", raw_dir=tmp_path / "raw")
    before = content(tmp_path / "out")
    write_lines(tmp_path / "raw" / "gsm8k" / "test.jsonl", [{"question": "q", "answer": "a"}])
    train.write_text('{"question": "q", "answer": "a"}\n{"question": "q",\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2:1[78] is not valid JSON"):
        build_task("gsm8k", tmp_path / "out", raw_dir=tmp_path / "raw")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.jsonl", '{"prompt": "p", "response": "r"}\n', "not built here"),
        ("manifest.json", "{", "is not valid JSON"),
        ("manifest.json", '{"format": 9}', "format 9"),
        ("manifest.json", '{"format": 1, "files": 3}', "is not a dataset's manifest"),
    ],
)
def test_folder_of_something_else_is_refused(repository: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "strategyqa").mkdir()
    (tmp_path / "strategyqa" / name).write_text(text)
    before = content(tmp_path / "strategyqa")
    with pytest.raises(DataError, match=message):
        build_task("strategyqa", tmp_path, raw_dir=repository)
    assert content(tmp_path / "strategyqa") == before


def test_folder_of_another_dataset_is_refused(repository: Path, tmp_path: Path) -> None:
    build_task("question_selection", tmp_path, raw_dir=repository)
    (tmp_path / "question_selection").rename(tmp_path / "strategyqa")
    with pytest.raises(DataError, match="holds the dataset of question_selection"):
        build_task("strategyqa", tmp_path, raw_dir=repository)
    (tmp_path / "file").write_text("")
    with pytest.raises(MeteoraError, match="file"):
        build_task("strategyqa", tmp_path / "file", raw_dir=repository)


def test_failures_are_collected(repository: Path, tmp_path: Path, write_json: Any) -> None:
    write_json(repository / "bigbench" / "benchmark_tasks" / "winowhy" / "task.json", {"examples": [{"input": "x", "target": "y"}]})
    for jobs in (1, 2):
        failures: dict[str, MeteoraError] = {}
        out = tmp_path / str(jobs)
        done = build_tasks(["winowhy", "strategyqa"], out, BuildRequest(source="local", raw_dir=repository), jobs=jobs, failures=failures)
        assert [manifest.task for manifest in done] == ["strategyqa"]
        assert "too few" in failures["winowhy"].message
        with pytest.raises(DataError, match="too few"):
            build_tasks(["winowhy", "strategyqa"], out, BuildRequest(source="local", raw_dir=repository), jobs=jobs)
    with pytest.raises(UsageError, match="jobs must be"):
        build_tasks(["winowhy"], tmp_path, jobs=0)


def test_full_disk(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(row: Row) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "row_line", full)
    with pytest.raises(StorageError, match="no space left"):
        build_task("strategyqa", tmp_path, raw_dir=repository)
    assert list(tmp_path.glob("*qa*")) == []


@pytest.mark.parametrize("text", ["ü \u2028 \U0001f600 \x00", "half \ud83d", 'quote " \\ \n'])
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "test.jsonl").write_bytes(row_line(Row(text, text)))
    assert read_rows(tmp_path, "x", "test") == [Row(text, text)]


def test_verify_names_every_fault(repository: Path, tmp_path: Path) -> None:
    build_tasks(THREE, tmp_path, BuildRequest(raw_dir=repository))
    path = tmp_path / "strategyqa" / "test.jsonl"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"even", b"evil", 1))
    (tmp_path / "logical_deduction" / "train.jsonl").unlink()
    broken = (tmp_path / "question_selection" / "test.jsonl").read_bytes()
    (tmp_path / "question_selection" / "test.jsonl").write_bytes(broken[:-10] + b"\n")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "test.jsonl").write_text("")
    reports = {report.task: report for report in verify(tmp_path)}
    assert not any(report.ok for report in reports.values())
    assert "was changed" in reports["strategyqa"].problems[0]
    assert "is missing" in reports["logical_deduction"].problems[0]
    assert any("is not valid JSON" in problem for problem in reports["question_selection"].problems)
    assert "has no manifest.json" in reports["loose"].problems[0]
    assert "is not built" in verify(tmp_path, ["gsm8k"])[0].problems[0]
    with pytest.raises(DataError, match="no datasets"):
        verify(tmp_path / "none")


def test_list(repository: Path, tmp_path: Path) -> None:
    build_task("strategyqa", tmp_path, raw_dir=repository)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "test.jsonl").write_text("{}\n{}\n")
    found = {status.name: status for status in list_tasks(tmp_path)}
    assert list(found)[:2] == ["abstract_narrative_understanding", "alpaca"]
    assert (found["strategyqa"].built, found["strategyqa"].rows, found["strategyqa"].built_from) == (True, {"train": 80, "test": 20}, "local")
    assert (found["gsm8k"].built, found["gsm8k"].rows) == (False, {})
    assert (found["loose"].metric, found["loose"].rows) == ("unknown", {"test": 2})
    assert found["composite_3"].members == tuple(THREE)


def test_plan_writes_nothing(repository: Path, tmp_path: Path) -> None:
    build_task("strategyqa", tmp_path / "out", raw_dir=repository)
    before = content(tmp_path / "out")
    plans = {plan.task: plan for plan in plan_build(["strategyqa", "winowhy", "gsm8k"], tmp_path / "out")}
    assert [plans[name].action for name in plans] == ["keep", "build", "build"]
    assert plans["winowhy"].download == "bigbench-1.0.0.tar.gz (358 MB)"
    assert plans["gsm8k"].sources == ("hub", "authors")
    assert plan_build(["strategyqa"], tmp_path / "out", BuildRequest(raw_dir=repository))[0].action == "replace"
    assert content(tmp_path / "out") == before


BUILD_FOREVER = """
import sys
from meteora_core.data.build import build_task
print("ready", flush=True)
for turn in range(10**6):
    build_task("strategyqa", sys.argv[1], raw_dir=sys.argv[2], max_train=40 + turn % 2)
"""


def test_kill_leaves_the_old_or_the_new_dataset(repository: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", BUILD_FOREVER, str(tmp_path / "out"), str(repository)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05 + rng.random() / 20)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        report = verify(tmp_path / "out")[0]
        assert report.ok, report.problems
        seen.add(report.rows["train"])
    assert seen <= {40, 41}


def test_leftovers_of_a_killed_build_are_removed(repository: Path, tmp_path: Path) -> None:
    (tmp_path / ".strategyqa.abcd_123.tmp").mkdir()
    (tmp_path / ".strategyqa.lock").write_text("")
    build_task("strategyqa", tmp_path, raw_dir=repository)
    assert [path.name for path in tmp_path.glob(".strategyqa.*")] == []
