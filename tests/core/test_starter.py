"""The starter checkpoint: its location, and the demonstration that uses it, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import meteora_core.starter as starter
from meteora_core.data.rows import split_path
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.evaluation.intervals import wilson_interval
from meteora_core.json_files import write_json
from meteora_core.starter import MAX_BYTES, default_checkpoint, starter_checkpoint
from meteora_core.starter.run import SHOWN, StarterPlan, run_starter, starter_tasks
from support.evaluation_workspace import TASKS, make_packed


@pytest.fixture
def packed(tmp_path, make_adapter) -> Path:
    """A tiny checkpoint with embedded adapters, and raw rows of its tasks."""
    make_packed(tmp_path, make_adapter)
    return tmp_path / "packed"


def look(packed: Path, **sizes: int):
    plan = StarterPlan(packed.parent / "run", packed, **{"test_rows": 2, "composite_rows": 1, "new_tokens": 4, **sizes})
    return run_starter(plan, "cpu", data_source="local", raw_dir=packed.parent / "raw")


def test_a_first_look_and_its_cache(packed, monkeypatch) -> None:
    result = look(packed)
    assert list(result.scores) == ["strategyqa", "question_selection", "logical_deduction", "three_tasks"]
    assert all(set(models) == {"base", "meteora"} for models in result.scores.values())
    assert result.rows == dict.fromkeys(TASKS, 2) | {"three_tasks": 1}
    assert result.intervals["strategyqa"]["base"]["accuracy"] == pytest.approx(wilson_interval(result.scores["strategyqa"]["base"]["accuracy"], 2))
    assert result.intervals["three_tasks"]["meteora"]["correct"] is None  # one row has no standard error
    assert result.answer is not None
    sample = json.loads((packed.parent / "run" / "results" / "meteora" / "three_tasks.json").read_text())["samples"][0]
    assert len(result.answer.tokens) == len(sample["tokens"])
    assert set(result.answer.names) == set(TASKS)
    assert all(0 <= adapter < 3 and 0 < weight <= 1 for _, adapter, weight in result.answer.tokens)
    assert [picture.name for picture in result.pictures] == ["routing.html", "routing.png"]
    assert "three_tasks, test row 0" in result.pictures[0].read_text()
    assert result.own_share == pytest.approx(1.0)  # all three adapters are the composite's own
    monkeypatch.setattr("meteora_core.model.base.load_base", lambda *_, **__: pytest.fail("the model was loaded again"))
    again = look(packed)
    assert again.__dict__ | {"seconds": result.seconds} == result.__dict__


def test_changed_rows_are_scored_anew(packed) -> None:
    look(packed, composite_rows=0)
    file = split_path(packed.parent / "run" / "datasets", TASKS[0], "test")
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[::-1]) + "\n")
    result = look(packed, composite_rows=0)
    sample = json.loads((packed.parent / "run" / "results" / "base" / f"{TASKS[0]}.json").read_text())["samples"][0]
    assert sample["prompt"] == json.loads(rows[-1])["prompt"]
    assert "three_tasks" not in result.scores


def test_rows_with_long_prompts_are_passed_over(packed) -> None:
    look(packed, composite_rows=0)
    file = split_path(packed.parent / "run" / "datasets", TASKS[0], "test")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    long = {**rows[0], "prompt": rows[0]["prompt"] * 40}
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], long, *rows[1:])))
    result = look(packed, composite_rows=0)
    samples = json.loads((packed.parent / "run" / "results" / "base" / f"{TASKS[0]}.json").read_text())["samples"]
    assert [sample["doc_id"] for sample in samples] == [0, 2]
    assert result.rows[TASKS[0]] == 2


def test_what_cannot_be_looked_at(packed, tmp_path) -> None:
    with pytest.raises(UsageError, match="no rows"):
        look(packed, test_rows=0)
    config = json.loads((packed / "meteora_config.json").read_text())
    config["adapters"] = [{**adapter, "name": f"my_{adapter['name']}"} for adapter in config["adapters"]]
    write_json(packed / "meteora_config.json", config)
    with pytest.raises(CheckpointError, match="has no adapter for any of strategyqa"):
        starter_tasks(packed)


def test_where_a_checkpoint_is_looked_for(tmp_path, monkeypatch) -> None:
    own, quick = tmp_path / "own", tmp_path / "quick"
    monkeypatch.setattr(starter, "starter_checkpoint", lambda: None)
    assert default_checkpoint(quick, own) == own
    monkeypatch.setattr(starter, "starter_checkpoint", lambda: tmp_path / "starter")
    assert default_checkpoint(quick, own) == tmp_path / "starter"
    own.mkdir()
    assert default_checkpoint(quick, own) == own


def test_the_shipped_checkpoint_is_small_and_complete() -> None:
    folder = starter_checkpoint()
    assert folder is not None, "the package comes with one"
    from meteora_core.checkpoints.native import read_checkpoint

    config, _, bank = read_checkpoint(folder)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MAX_BYTES
    assert config["contains"] == ["gates", "adapters"]
    assert starter_tasks(folder) == SHOWN[:3]
    assert set(SHOWN) <= set(bank.names)
    assert "Scores on test rows" in (folder / "README.md").read_text()
