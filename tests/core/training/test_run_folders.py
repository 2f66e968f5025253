"""Folders of a run: states with other orders and of other runs, and contents that must not be replaced."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from meteora_core import AdapterBank
from meteora_core.errors import BusyError, CheckpointError, StorageError, UsageError
from meteora_core.files import sha256
from meteora_core.settings import GateTrainSettings
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.joint_adapters import train_together
from meteora_core.training.parallel_adapters import train_in_parallel
from meteora_core.training.single_adapter import train_adapter
from meteora_core.training.state import RunState, load_state, save_state
from support.tiny_training import BASE, Killed, adapter, gates, kill_at, letters, model, together_options


def other_order(data: Path, adapters: Path, folder: Path, **options):
    """The same as ``gates``, with the adapters in the opposite order."""
    settings = GateTrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2, save_steps=2, log_steps=1, log_to="none")
    bank = AdapterBank.from_peft({"count": adapters / "count", "shout": adapters / "shout"})
    return train_gates(model(), letters(), bank, settings, TrainJob(BASE, data, folder, **options))


def without_order(path: Path) -> None:
    """Rewrite a saved document as earlier versions did, which did not save the order."""
    document = json.loads(path.read_text())
    inputs = document["training"]["inputs"] if "training" in document else document["inputs"]
    assert inputs.pop("order") == ["shout", "count"]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("old", [False, True])
def test_gates_with_another_order_of_adapters_are_not_resumed(data, adapters, tmp_path, monkeypatch, old) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "x")
    if old:
        without_order(tmp_path / ".x.states" / "step-2" / "state.json")
    with pytest.raises(UsageError, match=r"order was \['shout', 'count'\], now \['count', 'shout'\]"):
        other_order(data, adapters, tmp_path / "x", resume=True)
    assert gates(data, adapters, tmp_path / "x", resume=True)[1].steps == 6


def test_a_finished_checkpoint_without_a_saved_order_is_current_for_its_own_order_only(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "x")
    without_order(tmp_path / "x" / "meteora_config.json")
    assert gates(data, adapters, tmp_path / "x")[1].skipped
    assert not other_order(data, adapters, tmp_path / "x").skipped


def test_joint_training_in_another_order_starts_from_the_beginning(data, tmp_path, monkeypatch) -> None:
    def run(order, out):
        return train_together(model(), letters(), order, **together_options(data, tmp_path / out))

    run(["shout", "count"], "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            run(["shout", "count"], "cut")
    run(["count", "shout"], "cut")
    for task in ("shout", "count"):
        whole, cut = (load_file(tmp_path / name / task / "adapter_model.safetensors") for name in ("whole", "cut"))
        for name, tensor in whole.items():
            torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_without_resume_drops_old_states_and_keeps_its_own(data, tmp_path, monkeypatch) -> None:
    def run(step, **changes):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                settings = together_options(data, tmp_path, **changes)["settings"]
                train_adapter(model(), letters(), "shout", settings, TrainJob(BASE, data, tmp_path / "a"))
        return sorted(path.name for path in (tmp_path / "a" / ".shout.states").iterdir()) if (tmp_path / "a" / ".shout.states").is_dir() else []

    assert run(6) == ["step-4"]
    assert run(4, learning_rate=1e-3) == ["step-2"]
    assert run(1) == []


def test_saving_a_state_removes_all_earlier_ones(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    for step in (9, 3):
        save_state(tmp_path, RunState(step=step), {"weight": weight}, torch.optim.AdamW([weight]), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_folder_with_other_contents_is_not_replaced_by_a_checkpoint(data, adapters, tmp_path, monkeypatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    kill_at(monkeypatch, 1)
    with pytest.raises(UsageError, match="not a checkpoint"):
        gates(data, adapters, tmp_path / "notes")
    (tmp_path / "notes" / "meteora_config.json").write_text("{}")
    (tmp_path / "notes" / "run").mkdir()
    with pytest.raises(UsageError, match=r"files that do not belong.*: run, thesis.txt$"):
        gates(data, adapters, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_a_folder_with_other_contents_is_not_replaced_by_an_adapter(data, tmp_path, monkeypatch) -> None:
    kept = tmp_path / "a" / "shout" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    kill_at(monkeypatch, 1)
    with pytest.raises(UsageError, match="not an adapter"):
        adapter(data, tmp_path / "a")
    with pytest.raises(UsageError, match="not an adapter"):
        train_together(model(), letters(), ["count", "shout"], **together_options(data, tmp_path / "a"))
    settings = together_options(data, tmp_path)["settings"]
    with pytest.raises(UsageError, match="not an adapter"):
        train_in_parallel({"count": settings, "shout": settings}, TrainJob(BASE, data, tmp_path / "a"), dtype=torch.float32, devices=["cpu"])
    assert kept.read_text() == "mine"
    kept.unlink()
    with pytest.raises(Killed):
        adapter(data, tmp_path / "a")


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(data, tmp_path, monkeypatch) -> None:
    settings = {"max_steps": 7, "log_steps": 3, "save_steps": 2}
    for name, step in (("whole", 99), ("cut", 6)):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with suppress(Killed):
                adapter(data, tmp_path / name, **settings)
    resumed = adapter(data, tmp_path / "cut", **settings)
    whole, cut = (json.loads((tmp_path / name / "shout" / "meteora_training.json").read_text()) for name in ("whole", "cut"))
    for run in (whole, cut):
        for entry in run["history"]:
            assert entry.pop("seconds") >= 0
    assert [entry["step"] for entry in whole["history"]] == [3, 6, 7]
    assert cut["history"] == whole["history"]
    assert resumed.loss == whole["loss"] == whole["history"][-1]["loss"]


def test_a_state_of_an_earlier_version_is_resumed(data, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            adapter(data, tmp_path / "a")
    file = tmp_path / "a" / ".shout.states" / "step-2" / "state.json"
    info = json.loads(file.read_text())
    del info["pending"]
    file.write_text(json.dumps(info))
    assert adapter(data, tmp_path / "a").steps == 6


@pytest.mark.parametrize("broken", ["[]", "{}", '{"inputs": 3}'])
def test_a_broken_state_is_reported_in_one_line(tmp_path, broken) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    save_state(tmp_path, RunState(step=3), {"weight": weight}, optimizer, {})
    with pytest.raises(CheckpointError, match="lacks other"):
        load_state(tmp_path, {"other": weight}, optimizer, {})
    weights = tmp_path / "step-3" / "state.safetensors"
    saved = weights.read_bytes()
    weights.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its hash differs"):
        load_state(tmp_path, {"weight": weight}, optimizer, {})
    (tmp_path / "step-3" / "state.json").write_text(broken)
    with pytest.raises(CheckpointError, match=r"state\.json.*(missing|object)") as caught:
        load_state(tmp_path, {"weight": weight}, optimizer, {})
    assert "remove" in (caught.value.hint or "")


@pytest.mark.parametrize(("key", "value"), [("pending", {"tallies": {"gate/v_proj": ["x", 1.0]}}), ("pending", []), ("step", -1), ("history", [{"loss": "x"}])])
def test_a_state_with_a_wrong_type_is_one_line(tmp_path, key, value) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    save_state(tmp_path, RunState(step=3), {"weight": weight}, optimizer, {})
    file = tmp_path / "step-3" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=key) as caught:
        load_state(tmp_path, {"weight": weight}, optimizer, {})
    assert "remove" in (caught.value.hint or "")


def test_the_second_run_of_the_same_adapter_or_gates_is_refused(data, adapters, tmp_path, monkeypatch) -> None:
    def busy(path, **_):
        raise BusyError(f"{path} is being written by process 1")

    monkeypatch.setattr("meteora_core.files.exclusive", busy)
    with pytest.raises(BusyError, match="count"):
        adapter(data, tmp_path / "new", "count")
    with pytest.raises(BusyError, match="count"):
        train_together(model(), letters(), ["count", "shout"], **together_options(data, tmp_path / "new"))
    with pytest.raises(BusyError, match="x is being"):
        gates(data, adapters, tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()
    assert adapter(data, tmp_path / "adapters", "count").skipped


def test_the_next_run_removes_what_a_killed_one_left(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "x")
    for folder, name in ((adapters, "count"), (tmp_path, "x")):
        (folder / f".{name}.states" / "step-2").mkdir(parents=True)
        (folder / f".{name}.abcdefgh.tmp").mkdir()
        (folder / f".{name}.lock").write_text("")
    assert adapter(data, adapters, "count").skipped
    assert gates(data, adapters, tmp_path / "x")[1].skipped
    assert [path.name for folder in (adapters, tmp_path) for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_reported_in_one_line_and_the_run_can_be_resumed(data, tmp_path, monkeypatch) -> None:
    whole = adapter(data, tmp_path / "whole")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for place in ("safetensors.torch.save_file", "peft.peft_model.safe_save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(StorageError, match="no space left"):
                adapter(data, tmp_path / "cut")
        assert not (tmp_path / "cut" / "shout").exists()
        assert [path.name for path in (tmp_path / "cut").glob("**/*.tmp")] == []
    resumed = adapter(data, tmp_path / "cut")
    assert sha256(resumed.folder / "adapter_model.safetensors") == sha256(whole.folder / "adapter_model.safetensors")
    assert sha256(resumed.folder / "adapter_config.json") == sha256(whole.folder / "adapter_config.json")


def test_module_names_in_the_configuration_are_sorted(data, tmp_path) -> None:
    config = json.loads((adapter(data, tmp_path).folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_no_steps_have_no_loss(data, tmp_path) -> None:
    done = adapter(data, tmp_path, max_steps=0)
    assert done.steps == 0
    assert math.isnan(done.loss)
    assert json.loads((done.folder / "meteora_training.json").read_text())["loss"] is None
