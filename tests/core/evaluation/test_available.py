"""Hints for missing datasets, with all commands that build them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from meteora_core.data.tasks import COMPOSITES, Task, get_task
from meteora_core.data.tasks import Combined as CombinedSource
from meteora_core.errors import DataError
from meteora_core.evaluation.available import check_built
from meteora_core.json_files import write_jsonl

ROW = [{"prompt": "[INST] a [/INST]\n", "response": "b"}]


def put(folder: Path, *tasks: str) -> None:
    for task in tasks:
        for split in ("train", "test"):
            write_jsonl(folder / task / f"{split}.jsonl", ROW)


def hint_of(tasks: list[Task], folder: Path, *others: Path) -> str:
    with pytest.raises(DataError) as raised:
        check_built(tasks, folder, others)
    return str(raised.value.hint)


def commands(hint: str) -> list[list[str]]:
    return [shlex.split(command) for command in re.findall(r"`(meteora [^`]+)`", hint)]


def test_a_composite_names_its_members_and_then_itself() -> None:
    members = ",".join(COMPOSITES["composite_10"])
    hint = hint_of([get_task("composite_10")], Path("datasets"))
    assert hint == f"run `meteora data build --task {members}`, then `meteora data composite --n 10`"


def test_only_what_is_missing_is_built_and_where_it_is_looked_for(tmp_path) -> None:
    place = tmp_path / "my data"
    put(place, "logical_deduction", "strategyqa", "winowhy")
    (place / "strategyqa" / "train.jsonl").unlink()  # a composite draws its solved examples from there
    asked = [get_task(name) for name in ("winowhy", "gsm8k", "composite_3")]
    assert commands(hint_of(asked, place)) == [
        ["meteora", "data", "build", "--task", "gsm8k,question_selection,strategyqa", "--out", str(place)],
        ["meteora", "data", "composite", "--n", "3", "--out", str(place)],
    ]
    own = Task("both", None, "composite", CombinedSource(), members=("winowhy", "logical_deduction"))
    assert commands(hint_of([own], place)) == [
        ["meteora", "data", "composite", "--tasks", "winowhy,logical_deduction", "--name", "both", "--out", str(place)],
    ]
    put(place, "gsm8k", "composite_3")
    check_built(asked, place)


def test_rows_of_the_quickstart_are_named(tmp_path) -> None:
    put(tmp_path / "starter", "strategyqa")
    hint = hint_of([get_task("strategyqa")], tmp_path / "datasets", tmp_path / "none", tmp_path / "starter")
    assert hint.startswith(f"add `--data {tmp_path / 'starter'}`, where the quickstart has them, or run `meteora data build --task strategyqa --out ")
    assert "starter" not in hint_of([get_task("strategyqa"), get_task("gsm8k")], tmp_path / "datasets", tmp_path / "starter")
