"""``meteora data``: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from meteora_cli.commands import data as command
from meteora_cli.display import console, out
from meteora_core.errors import DataError, UsageError
from support.commands import command_runner, restored_tasks

THREE = "logical_deduction,question_selection,strategyqa"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """BIG-bench's layout with composite_3's tasks, and a task of records."""
    root = tmp_path / "raw"
    for name in THREE.split(","):
        examples = [{"input": f"{name} {i}?", "target_scores": {f"No {i}.": 0, f"Yes {i}.": 1}} for i in range(100)]
        (root / name).mkdir(parents=True)
        (root / name / "task.json").write_text(json.dumps({"examples": examples}))
    (root / "gsm8k").mkdir()
    (root / "gsm8k" / "train.jsonl").write_text("".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(20)))
    return root


@pytest.fixture
def meteora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``data`` with arguments in an empty folder; a known error is raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    for each in (console, out):  # they read COLUMNS when they are made
        monkeypatch.setattr(each, "_width", 200)
    with restored_tasks():
        yield command_runner("data", command.app)


def test_build_composite_list_show_verify(meteora: Any, raw: Path) -> None:
    built = json.loads(meteora("build", "--task", THREE, "--source", "local", "--raw-dir", str(raw), "--json").stdout)
    assert [manifest["task"] for manifest in built["built"]] == THREE.split(",")
    assert built["failed"] == {}
    assert Path("datasets/strategyqa/test.jsonl").is_file()

    composite = json.loads(meteora("composite", "--n", "3", "--num-samples", "5", "--json").stdout)
    assert (composite["task"], composite["files"]["test.jsonl"]["rows"]) == ("composite_3", 5)

    listed = {entry["name"]: entry for entry in json.loads(meteora("list", "--json").stdout)}
    assert len(listed) == 31
    assert listed["strategyqa"]["rows"] == {"train": 80, "test": 20}
    assert not listed["gsm8k"]["built"]

    shown = json.loads(meteora("show", "composite_3", "-n", "2", "--json").stdout)
    assert len(shown["rows"]) == 2
    assert shown["rows"][0]["response"].count("@@@@\n") == 2

    assert {report["ok"] for report in json.loads(meteora("verify", "--json").stdout)} == {True}


def test_tables(meteora: Any, raw: Path) -> None:
    table = meteora("build", "--task", "strategyqa", "--task", "gsm8k", "--raw-dir", str(raw)).stdout
    assert "strategyqa" in table
    assert "80" in table
    assert "logical_deduction" in meteora("list").stdout
    panel = meteora("show", "strategyqa", "--split", "train").stdout
    assert "[INST] Q: strategyqa" in panel
    assert "response" in panel
    assert "ok" in meteora("verify", "strategyqa").stdout


def test_out_folder_and_limits(meteora: Any, raw: Path) -> None:
    meteora("build", "--task", "strategyqa", "--raw-dir", str(raw), "--out", "else", "--max-train", "9", "--max-test", "4", "--jobs", "2")
    assert len(Path("else/strategyqa/train.jsonl").read_text().splitlines()) == 9
    assert not Path("datasets").exists()


def test_dry_runs_write_nothing(meteora: Any, raw: Path, tmp_path: Path) -> None:
    plans = json.loads(meteora("build", "--task", "all", "--dry-run", "--json").stdout)
    assert len(plans) == 28
    assert {plan["action"] for plan in plans} == {"build"}
    meteora("build", "--task", THREE, "--raw-dir", str(raw), "--out", "made")
    before = sorted(tmp_path.rglob("*"))
    plan = json.loads(meteora("composite", "--n", "3", "--out", "made", "--dry-run", "--json").stdout)
    assert plan["rows"] == 20
    counts = json.loads(
        meteora("add", "mine", "--train", str(raw / "gsm8k" / "train.jsonl"), "--template", "{question}", "--target", "{answer}", "--dry-run", "--json").stdout
    )
    assert counts["rows"] == {"train": 16, "test": 4}
    for arguments in (["build", "--task", "gsm8k", "--dry-run"], ["composite", "--n", "3", "--out", "made", "--dry-run"]):
        assert meteora(*arguments).stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_add_a_task_and_use_it(meteora: Any, raw: Path) -> None:
    added = json.loads(
        meteora(
            "add",
            "mine",
            "--train",
            str(raw / "gsm8k" / "train.jsonl"),
            "--template",
            "Solve {question}",
            "--target",
            "{answer}",
            "--metric",
            "contains",
            "--json",
        ).stdout
    )
    assert added["metric"] == "contains"
    shown = json.loads(meteora("show", "mine", "--json").stdout)
    assert shown["rows"][0]["prompt"].startswith("Solve q")
    assert shown["metric"] == "contains"


def test_a_folder_of_many_is_added_at_once(meteora: Any, tmp_path: Path) -> None:
    many = tmp_path / "many"
    (many / "chat").mkdir(parents=True)
    talk = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "HI"}]}
    (many / "chat" / "train.jsonl").write_text((json.dumps(talk) + "\n") * 10)
    (many / "sql.csv").write_text("question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(10)))
    (many / "done.json").write_text(json.dumps([{"prompt": f"Q: {word}\nA:", "completion": "x"} for word in ("one", "two", "ten", "six", "won")]))
    added = json.loads(meteora("add", "many", "--template", "inst", "--json").stdout)
    assert {each["task"]: (each["source"]["columns"], each["files"]["train.jsonl"]["rows"]) for each in added["added"]} == {
        "chat": ("messages", 8),
        "done": ("prompt and response (prompt, completion)", 4),
        "sql": ("question and answer (question, answer)", 8),
    }
    assert added["failed"] == {}
    assert added["added"][0]["example"] == {"prompt": "[INST] Say hi [/INST]\n", "response": "HI"}
    assert added["added"][0]["frame"] == {"before": "[INST] ", "after": " [/INST]\n"}
    assert {report["ok"] for report in json.loads(meteora("verify", "--json").stdout)} == {True}

    (many / "bad.jsonl").write_text('{"prompt": 1}\n')
    failed = meteora("add", "many", "--template", "inst", fails=DataError)
    assert failed.exception.message == "1 of 4 datasets could not be added: bad"
    assert "question and answer (question, answer); frame: '[INST] {} [/INST]\\n'" in failed.stdout


def test_the_format_and_a_row_are_shown(meteora: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"ask": f"Why {i}?", "reply": "So."}) + "\n" for i in range(5)))
    arguments = ("add", "mine", "--train", "t.jsonl", "--columns", "question=ask", "--columns", "answer=reply", "--template", "### Q:\\n{}\\n### A:\\n")
    for extra in (["--dry-run"], []):
        shown = meteora(*arguments, *extra).stdout
        assert "mine: question and answer (ask, reply); frame: '### Q:\\n{}\\n### A:\\n'" in shown
        assert re.search(r"### Q:\s+│\n│ Why \d\?\s+│\n│ ### A:", shown)
    looked = json.loads(meteora(*arguments, "--dry-run", "--json").stdout)
    assert (looked["columns"], looked["rows"]) == ("question and answer (ask, reply)", {"train": 4, "test": 1})


def test_a_hint_never_leads_to_a_command_that_fails(meteora: Any, tmp_path: Path) -> None:
    hint = meteora("build", "--task", "pirate", fails=UsageError).exception.hint
    assert "meteora data add pirate --train FILE" in hint
    hint = meteora("add", "pirate", fails=UsageError).exception.hint
    (tmp_path / "FILE").write_text('{"question": "q", "answer": "a"}\n' * 5)
    meteora(*hint.partition("meteora data ")[2].split(), "--template", "raw")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.jsonl", "b.jsonl", "--train", "c.jsonl"), "--train gives the rows of one task, and 2 are named"),
        (("t.jsonl", "--test", "c.jsonl"), "--test has no effect here: it needs --train"),
        (("t.jsonl", "--columns", "question"), "'question' is not of the form KNOWN=YOURS"),
        (("t.jsonl", "t.jsonl"), "two of these datasets are called t"),
        (("t.jsonl", "--template", "none"), "has no place for the user's text"),
    ],
)
def test_wrong_ways_to_add(meteora: Any, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert message in meteora("add", *arguments, fails=UsageError).exception.message


def test_task_of_the_settings(meteora: Any, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    (tmp_path / "meteora.toml").write_text('[tasks.mine]\ntrain = "train.jsonl"\ntest = "test.jsonl"\nmetric = "text"\n')
    assert json.loads(meteora("build", "--task", "mine", "--json").stdout)["built"][0]["metric"] == "text"
    assert {entry["name"]: entry["metric"] for entry in json.loads(meteora("list", "--json").stdout)}["mine"] == "text"


def test_failures(meteora: Any, raw: Path) -> None:
    error = meteora("build", "--task", "strategyqa,winowhy", "--source", "local", "--raw-dir", str(raw), fails=DataError).exception
    assert error.message == "1 of 2 tasks could not be built: winowhy"
    assert Path("datasets/strategyqa/manifest.json").is_file()
    assert meteora("build", "--task", "strategqa", fails=UsageError).exception.hint == "did you mean 'strategyqa'?"
    meteora("build", "--task", "strategyqa", "--source", "local", fails=UsageError)
    meteora("composite", "--n", "3", fails=DataError)
    meteora("composite", "--n", "4", "--tasks", "gsm8k,winowhy", fails=UsageError)
    meteora("show", "gsm8k", fails=DataError)
    meteora("show", "strategyqa", "--split", "dev", fails=UsageError)
    meteora("add", "mine", "--train", "none.jsonl", fails=DataError)
    Path("datasets/strategyqa/test.jsonl").write_text("")
    error = meteora("verify", "--json", fails=DataError)
    assert json.loads(error.stdout)[0]["ok"] is False


def test_datasets_that_are_no_files(meteora: Any, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "strategyqa"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "test.jsonl")
    (folder / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    listed = {entry["name"]: entry for entry in json.loads(meteora("list", "--json").stdout)}
    assert listed["strategyqa"]["rows"] == {"train": 1}
    assert re.search(r"test\.jsonl is a pipe, not a file", meteora("show", "strategyqa", fails=DataError).exception.message)
    (folder / "manifest.json").symlink_to("manifest.json")
    assert re.search(
        "leads back to itself", meteora("build", "--task", "strategyqa", "--source", "local", "--raw-dir", "raw", fails=DataError).exception.message
    )
    shutil.rmtree(folder)
    assert re.search(
        "is a device, not a folder", meteora("build", "--task", "strategyqa", "--source", "local", "--raw-dir", os.devnull, fails=DataError).exception.message
    )


def test_a_refused_archive_leaves_nothing(meteora: Any, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    assert re.search(
        r"not a complete tar\.gz", meteora("build", "--task", "strategyqa", "--source", "local", "--raw-dir", "a.tar.gz", fails=DataError).exception.message
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.tar.gz"]
    assert not (tmp_path / "datasets").exists()
    assert not list((tmp_path / "cache" / "archives").iterdir())
