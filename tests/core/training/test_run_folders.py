"""What a run finds in its folders: states of other orders and of other runs, and what is not to be replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_stages import BASE, Killed, adapter, adapters, data, gates, kill_at, model
from test_together import options
from test_training_rows import letters

from meteora_core import AdapterBank
from meteora_core.errors import UsageError
from meteora_core.settings import GateTrainSettings
from meteora_core.training.adapters import train_adapter
from meteora_core.training.gates import train_gates
from meteora_core.training.jobs import JobPlan, train_side_by_side
from meteora_core.training.state import RunState, save_state
from meteora_core.training.together import train_together

__all__ = ["adapters", "data"]


def other_order(data: Path, adapters: Path, folder: Path, **options):
    """What ``gates`` does, with the adapters in the other order."""
    settings = GateTrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2, save_steps=2, log_steps=1, log_to="none")
    bank = AdapterBank.from_peft({"count": adapters / "count", "shout": adapters / "shout"})
    return train_gates(model(), letters(), bank, base=BASE, data_dir=data, folder=folder, settings=settings, **options)


def without_order(path: Path) -> None:
    """Rewrite a saved document as versions wrote it that did not save the order."""
    document = json.loads(path.read_text())
    inputs = document["training"]["inputs"] if "training" in document else document["inputs"]
    assert inputs.pop("order") == ["shout", "count"]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("old", [False, True])
def test_gates_of_another_order_are_not_resumed(data, adapters, tmp_path, monkeypatch, old) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "x")
    if old:
        without_order(tmp_path / ".x.states" / "step-2" / "state.json")
    with pytest.raises(UsageError, match=r"order was \['shout', 'count'\], now \['count', 'shout'\]"):
        other_order(data, adapters, tmp_path / "x", resume=True)
    assert gates(data, adapters, tmp_path / "x", resume=True)[1].steps == 6


def test_a_finished_checkpoint_without_a_saved_order_is_current_in_its_own_order(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "x")
    without_order(tmp_path / "x" / "meteora_config.json")
    assert gates(data, adapters, tmp_path / "x")[1].skipped
    assert not other_order(data, adapters, tmp_path / "x").skipped


def test_adapters_together_in_another_order_start_anew(data, tmp_path, monkeypatch) -> None:
    def run(order, out):
        return train_together(model(), letters(), order, **options(data, tmp_path / out))

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
                train_adapter(model(), letters(), "shout", resume=False, **options(data, tmp_path / "a", **changes))
        return sorted(path.name for path in (tmp_path / "a" / ".shout.states").iterdir()) if (tmp_path / "a" / ".shout.states").is_dir() else []

    assert run(6) == ["step-4"]
    assert run(4, learning_rate=1e-3) == ["step-2"]
    assert run(1) == []


def test_a_state_removes_all_others(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    for step in (9, 3):
        save_state(tmp_path, RunState(step=step), {"weight": weight}, torch.optim.AdamW([weight]), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_folder_of_other_things_is_not_replaced_by_a_checkpoint(data, adapters, tmp_path, monkeypatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    kill_at(monkeypatch, 1)
    with pytest.raises(UsageError, match="not a checkpoint"):
        gates(data, adapters, tmp_path / "notes")
    (tmp_path / "notes" / "meteora_config.json").write_text("{}")
    (tmp_path / "notes" / "run").mkdir()
    with pytest.raises(UsageError, match=r"other files.*: run, thesis.txt$"):
        gates(data, adapters, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_a_folder_of_other_things_is_not_replaced_by_an_adapter(data, tmp_path, monkeypatch) -> None:
    kept = tmp_path / "a" / "shout" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    kill_at(monkeypatch, 1)
    with pytest.raises(UsageError, match="not an adapter"):
        adapter(data, tmp_path / "a")
    with pytest.raises(UsageError, match="not an adapter"):
        train_together(model(), letters(), ["count", "shout"], **options(data, tmp_path / "a"))
    settings = options(data, tmp_path)["settings"]
    with pytest.raises(UsageError, match="not an adapter"):
        train_side_by_side(JobPlan({"count": settings, "shout": settings}, BASE, torch.float32, ["cpu"], data, tmp_path / "a"))
    assert kept.read_text() == "mine"
    kept.unlink()
    with pytest.raises(Killed):
        adapter(data, tmp_path / "a")
