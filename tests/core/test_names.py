"""Names that become paths, and what may be replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_core.adapters.folders import INFO_FILE
from meteora_core.checkpoints.native import check_replaceable
from meteora_core.data.build import build_task
from meteora_core.data.catalog import verify
from meteora_core.data.composite import CompositeRequest, plan_composite
from meteora_core.data.tasks import RESERVED, TASKS
from meteora_core.data.userdata import own_task
from meteora_core.errors import DataError, UsageError
from meteora_core.names import KEYWORDS, LONGEST, check_name, folder_of, inside, is_name, problem_of
from meteora_core.settings import load_settings
from meteora_core.training.job import TrainJob
from meteora_core.training.joint_adapters import train_together
from meteora_core.training.output_folders import check_adapter_folder, check_targets
from meteora_core.training.parallel_adapters import train_in_parallel
from meteora_core.training.single_adapter import train_adapter

BAD = [
    "",
    ".",
    "..",
    "../mydata",
    "a/b",
    "a/",
    "./a",
    "/tmp/a",
    "a\\b",
    ".hidden",
    "a..b",
    "a.",
    "-a",
    "a b",
    "a\n",
    "a\x1b[31m",
    "é",
    "a\x00",
    "x" * 121,
    "all",
    "Base",
]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_name(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(UsageError, match="cannot name a task") as refused:
        check_name(name)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["a", "7b", "_x", "my-task", "v1.5", "composite_10", "x" * LONGEST])
def test_what_can_be_a_name(name: str) -> None:
    assert check_name(name) == name


def test_every_built_in_task_has_a_valid_name() -> None:
    assert [name for name in (*TASKS, *RESERVED) if problem_of(name)] == []


@pytest.mark.parametrize("name", ["../mydata", "a/b", "all", "tensorboard"])
def test_every_entry_point_refuses_such_names(tmp_path: Path, name: str) -> None:
    job = TrainJob(None, tmp_path, tmp_path / "out")  # type: ignore[arg-type]
    calls = [
        lambda: own_task(name, train=tmp_path / "x.jsonl"),
        lambda: verify(tmp_path, [name]),
        lambda: plan_composite(tmp_path, CompositeRequest(tasks=["strategyqa", "gsm8k"], name=name)),
        lambda: load_settings(None, {"tasks": {name: {"train": "a", "test": "b"}}}),
        lambda: load_settings(None, {"train_adapters": {"tasks": {name: {"rank": 2}}}}),
        lambda: train_adapter(None, None, name, None, job),  # type: ignore[arg-type]
        lambda: train_adapter(None, None, "mixed", None, job, tasks=["a", name]),  # type: ignore[arg-type]
        lambda: train_together(None, None, [name], None, job),  # type: ignore[arg-type]
        lambda: train_in_parallel({name: None}, job, dtype=None, devices=["cpu"]),  # type: ignore[arg-type, dict-item]
    ]
    for call in calls:
        with pytest.raises(UsageError, match="cannot name"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_paths_stay_below_their_root(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(root)
    assert folder_of(tmp_path / "link", "a") == tmp_path / "link" / "a"
    assert folder_of(tmp_path / "not_there_yet", "a").name == "a"
    (root / "out").symlink_to(elsewhere)
    (root / "loop").symlink_to(root / "loop")
    (root / "here").symlink_to(root)
    for path, message in ((root / "out", "outside"), (root / "out" / "x", "outside"), (root / "loop", "loop"), (root / "here", "outside"), (root, "outside")):
        with pytest.raises(UsageError, match=message):
            inside(root, path)


def test_a_link_does_not_lead_a_dataset_or_an_adapter_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "my_task").symlink_to(tmp_path / "mine")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    with pytest.raises(UsageError, match="outside"):
        build_task(own_task("my_task", train=tmp_path / "rows.jsonl", test=tmp_path / "rows.jsonl"), tmp_path / "datasets")
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_adapter_that_meteora_did_not_train_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="not trained by Meteora"):
        check_adapter_folder(tmp_path)
    (tmp_path / INFO_FILE).write_text("{}")
    check_adapter_folder(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(UsageError, match=r"files that do not belong.*checkpoint-500"):
        check_adapter_folder(tmp_path)


@pytest.mark.parametrize("other", [".git", "thesis.txt", "run"])
def test_a_checkpoint_with_other_files_is_not_replaced(tmp_path: Path, other: str) -> None:
    (tmp_path / "meteora_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    check_replaceable(tmp_path)
    (tmp_path / other).mkdir()
    with pytest.raises(UsageError, match=rf"files that do not belong.*: {other}"):
        check_replaceable(tmp_path)


def test_a_dataset_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    task = own_task("my_task", train=tmp_path / "rows.jsonl", test=tmp_path / "rows.jsonl")
    build_task(task, tmp_path / "datasets")
    build_task(task, tmp_path / "datasets", force=True)
    (tmp_path / "datasets" / "my_task" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"files that do not belong.*notes\.txt"):
        build_task(task, tmp_path / "datasets", force=True)


def test_adapters_are_not_written_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        check_targets(tmp_path / "file", ["count"])


def test_keywords_are_lower_case() -> None:
    assert {word.lower() for word in KEYWORDS} == KEYWORDS
