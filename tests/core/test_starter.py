"""The starter checkpoint: its location, and the demonstration that uses it, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import meteora_core.starter as starter
from meteora_core.data.rows import split_path
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.json_files import write_json
from meteora_core.starter import MAX_BYTES, default_checkpoint, starter_checkpoint
from meteora_core.starter.run import StarterPlan, run_starter, starter_tasks
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
    assert list(result.scores) == [*TASKS, "composite_3"]
    assert all(set(models) == {"base", "meteora"} for models in result.scores.values())
    assert result.rows == dict.fromkeys(TASKS, 2) | {"composite_3": 1}
    assert [picture.name for picture in result.pictures] == ["routing.html", "routing.png"]
    assert "composite_3, test row 0" in result.pictures[0].read_text()
    assert result.own_share == pytest.approx(1.0)  # all three adapters are the composite's own
    monkeypatch.setattr("meteora_core.model.base.load_base", lambda *_, **__: pytest.fail("the model was loaded again"))
    again = look(packed)
    assert (again.scores, again.pictures, again.own_share) == (result.scores, result.pictures, result.own_share)


def test_changed_rows_are_scored_anew(packed) -> None:
    look(packed, composite_rows=0)
    file = split_path(packed.parent / "run" / "datasets", TASKS[0], "test")
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[::-1]) + "\n")
    result = look(packed, composite_rows=0)
    sample = json.loads((packed.parent / "run" / "results" / "base" / f"{TASKS[0]}.json").read_text())["samples"][0]
    assert sample["prompt"] == json.loads(rows[-1])["prompt"]
    assert "composite_3" not in result.scores


def test_what_cannot_be_looked_at(packed, tmp_path) -> None:
    with pytest.raises(UsageError, match="no rows"):
        look(packed, test_rows=0)
    config = json.loads((packed / "meteora_config.json").read_text())
    config["adapters"] = [{**adapter, "name": f"my_{adapter['name']}"} for adapter in config["adapters"]]
    write_json(packed / "meteora_config.json", config)
    with pytest.raises(CheckpointError, match="has no adapter for any of logical_deduction"):
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
    assert set(starter_tasks(folder)) == set(TASKS) <= set(bank.names)
    assert "Scores on test rows" in (folder / "README.md").read_text()
