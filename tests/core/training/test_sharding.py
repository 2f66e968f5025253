"""The attached model sharded over two processes equals one process: losses, gates, and a state that resumes anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import AdapterBank, attach
from meteora_core.errors import UsageError
from meteora_core.settings import GateTrainSettings
from meteora_core.training.distributed import Runtime, layer_classes, shard_units
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from support import processes, sharded_worker
from support.tiny_models import make_tiny_llama
from support.tiny_training import BASE, gates, held_out_rows, letters, model

SETTINGS = {"max_steps": 5, "learning_rate": 1e-2, "save_steps": 2, "log_steps": 1, "log_to": "none", "accumulation": 2, "eval_steps": 5, "init": "zeros"}
ALONG = {"trainable": "gates+adapters", "adapter_learning_rate": 2e-3, "answer_share": 0.5, "loss_on": "response", "gradient_checkpointing": True}


def sharded(data: Path, adapters: Path, folder: Path, batch_size: int, **more) -> None:
    options = {
        "data": str(data),
        "adapters": str(adapters),
        "folder": str(folder),
        "settings": {**SETTINGS, "batch_size": batch_size, **more.pop("settings", {})},
        **more,
    }
    processes.side_by_side(sharded_worker.main, [options], folder=folder.parent, environment={"DS_ACCELERATOR": "cpu"})


def training(folder: Path) -> dict:
    return json.loads((folder / "meteora_config.json").read_text())["training"]


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("more", [{}, ALONG])
def test_two_sharded_processes_equal_one(data, adapters, tmp_path, more, accelerate) -> None:
    held_out_rows(data)
    sharded(data, adapters, tmp_path / "two", 2, settings=more, accelerate=accelerate)
    gates(data, adapters, tmp_path / "one", **{**SETTINGS, "batch_size": 4, **more})
    one, two = training(tmp_path / "one"), training(tmp_path / "two")
    assert one["inputs"] == two["inputs"]
    assert [entry["loss"] for entry in two["history"]] == pytest.approx([entry["loss"] for entry in one["history"]], rel=1e-5, abs=1e-5)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3, abs=1e-4)
    assert len(two["evaluations"]) == 1
    whole, gathered = (load_file(tmp_path / name / "meteora.safetensors") for name in ("one", "two"))
    assert whole.keys() == gathered.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_state_of_sharded_processes_resumes_on_one_process_and_vice_versa(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "one", **{**SETTINGS, "batch_size": 4})
    sharded(data, adapters, tmp_path / "cut", 2, stop=4)
    assert [path.name for path in (tmp_path / ".cut.states").iterdir()] == ["step-4"]
    saved = load_file(tmp_path / ".cut.states" / "step-4" / "state.safetensors")
    assert {name.split(".")[0] for name in saved} == {"param", "adam"}
    sharded(data, adapters, tmp_path / "cut", 2)
    sharded(data, adapters, tmp_path / "moved", 2, stop=2)
    gates(data, adapters, tmp_path / "moved", resume=True, **{**SETTINGS, "batch_size": 4})
    whole = load_file(tmp_path / "one" / "meteora.safetensors")
    for name in ("cut", "moved"):
        assert [entry["loss"] for entry in training(tmp_path / name)["history"]] == pytest.approx(
            [entry["loss"] for entry in training(tmp_path / "one")["history"]], rel=1e-5, abs=1e-5
        )
        for key, tensor in load_file(tmp_path / name / "meteora.safetensors").items():
            torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("more", [{}, {name: value for name, value in ALONG.items() if name != "adapter_learning_rate"}])
def test_deepspeed_equals_one_process(data, adapters, tmp_path, stage, more) -> None:
    """ZeRO on CPUs, by DeepSpeed's CPU backend; only where DeepSpeed is installed."""
    pytest.importorskip("deepspeed")
    held_out_rows(data)
    gates(data, adapters, tmp_path / "one", **{**SETTINGS, "batch_size": 4, **more})
    sharded(data, adapters, tmp_path / "two", 2, settings=more, zero=stage)
    sharded(data, adapters, tmp_path / "cut", 2, settings=more, zero=stage, stop=4)
    saved = load_file(tmp_path / ".cut.states" / "step-4" / "state.safetensors")
    assert {name.split(".")[0] for name in saved} == {"param", "adam"}
    sharded(data, adapters, tmp_path / "cut", 2, settings=more, zero=stage)
    one = training(tmp_path / "one")
    whole = load_file(tmp_path / "one" / "meteora.safetensors")
    for name in ("two", "cut"):
        two = training(tmp_path / name)
        assert [entry["loss"] for entry in two["history"]] == pytest.approx([entry["loss"] for entry in one["history"]], rel=1e-5, abs=1e-5)
        assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3, abs=1e-4)
        for key, tensor in load_file(tmp_path / name / "meteora.safetensors").items():
            torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-4)


def test_two_rates_are_refused_where_deepspeed_would_lose_states(data, adapters, tmp_path) -> None:
    bank = AdapterBank.from_peft({"shout": adapters / "shout", "count": adapters / "count"})
    settings = GateTrainSettings(trainable="gates+adapters", adapter_learning_rate=1e-4)
    with pytest.raises(UsageError, match="at one rate"):
        train_gates(model(), letters(), bank, settings, TrainJob(BASE, data, tmp_path / "m", runtime=Runtime("deepspeed")))
    assert not (tmp_path / "m").exists()


def test_the_wrap_policy_takes_decoder_layers(make_adapter) -> None:
    attached = attach(make_tiny_llama(), AdapterBank.from_peft({"a": make_adapter("a")}), top_k=1)
    assert layer_classes(attached) == ["LlamaDecoderLayer"]
    assert list(shard_units(attached)) == list(attached.model.layers)
