"""Training curves in TensorBoard, Weights & Biases and MLflow: the real libraries, writing to files."""

from __future__ import annotations

import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.training import trackers
from meteora_core.training.trackers import CurvesOf, flat, open_curves
from support.tiny_training import gates, held_out_rows

NAMES = {"train/loss", "train/lm", "train/accuracy/shout", "held_out/gate_accuracy", "held_out/loss"}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


def curves(data: Path, adapters: Path, tmp_path: Path, kind: str) -> None:
    """Train with three log lines and two evaluations."""
    held_out_rows(data)
    gates(data, adapters, tmp_path / "m", log_to=kind, log_steps=2, eval_steps=3)


@needs("tensorboard")
def test_curves_in_tensorboard(data, adapters, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves(data, adapters, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "m")).Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("held_out/loss")] == [3, 6]


@needs("tensorboard")
def test_later_steps_of_an_interrupted_run_are_dropped(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):
        opened = open_curves("tensorboard", CurvesOf("gates", tmp_path / "m", {}, first))
        for step in steps:
            opened.log(step, {"train/loss": 10.0 * first + step, "broken": float("nan")})
        opened.close()
    events = EventAccumulator(str(tmp_path / "m")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")][-2:] == [(3, 23.0), (4, 24.0)]


@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_curves_in_wandb_without_a_network(data, adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    curves(data, adapters, tmp_path, "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()
    assert all(name.encode() in written for name in NAMES)
    assert b"settings.learning_rate" in written


@needs("mlflow")
@needs("sqlalchemy")
@pytest.mark.filterwarnings("default")
def test_curves_in_mlflow_without_a_server(data, adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'curves.db'}")
    curves(data, adapters, tmp_path, "mlflow")
    with sqlite3.connect(tmp_path / "curves.db") as database:
        found = database.execute("select key, step from metrics").fetchall()
        named = dict(database.execute("select key, value from params").fetchall())
        assert database.execute("select name from experiments where name = 'meteora'").fetchall()
    assert {name for name, _ in found} >= NAMES
    assert sorted(step for name, step in found if name == "train/loss") == [2, 4, 6]
    assert named["settings.max_steps"] == "6"


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_before_anything_is_trained(data, adapters, tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"{kind} is not installed") as caught:
        gates(data, adapters, tmp_path / "m", log_to=kind)
    assert f"meteora-lora[{kind}]" in (caught.value.hint or "")
    assert not (tmp_path / "m").exists()


@needs("tensorboard")
def test_tensorboard_writes_nothing_where_it_is_not_installed(data, adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    gates(data, adapters, tmp_path / "m", log_to="tensorboard")
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_cannot_be_started_is_reported_in_one_line(monkeypatch) -> None:
    from accelerate import tracking

    def refused(self) -> None:
        raise ConnectionError("no answer from the server\nand a long trace")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(tracking.WandBTracker, "start", refused)
    with pytest.raises(MeteoraError, match=r"^wandb could not be started: no answer from the server$") as caught:
        open_curves("wandb", CurvesOf("gates", None, {}))
    assert "--log-to none" in (caught.value.hint or "")


def test_inputs_are_written_flat() -> None:
    assert flat({"stage": "gates", "data": {"a": "hash"}, "order": ["a", "b"], "x": {"y": {"z": None}}}) == {
        "stage": "gates",
        "data.a": "hash",
        "order": "['a', 'b']",
        "x.y.z": "None",
    }
