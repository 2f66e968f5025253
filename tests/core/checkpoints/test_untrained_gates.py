"""Gates that were never trained are called so when they are saved, and refused when they are loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native import read_config
from meteora_core.checkpoints.opening import describe_checkpoint
from meteora_core.errors import CheckpointError
from meteora_core.model.attach import gate_origin, meteora_layers
from support.tiny_models import make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def bank(make_adapter) -> AdapterBank:
    return AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))})


@pytest.mark.parametrize("init", ["normal", "zeros"])
def test_untrained_gates_are_saved_as_such_and_not_loaded(bank, tmp_path: Path, caplog, init) -> None:
    model = attach(make_tiny_llama(), bank, init=init, seed=7)
    with caplog.at_level(logging.WARNING):
        save_checkpoint(model, tmp_path / "saved")
    assert "are untrained" in caplog.text
    assert read_config(tmp_path / "saved")["gates"] == "untrained"
    for refused in (lambda: load_checkpoint(tmp_path / "saved", make_tiny_llama()), lambda: describe_checkpoint(tmp_path / "saved")):
        with pytest.raises(CheckpointError, match="are untrained") as caught:
            refused()
        assert "allow_untrained" in str(caught.value.hint)
    loaded = load_checkpoint(tmp_path / "saved", make_tiny_llama(), allow_untrained=True)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert gate_origin(loaded) == "untrained"


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), lambda model: model.half().float(), lambda model: model.double()])
def test_a_change_of_dtype_trains_nothing(bank, change) -> None:
    assert gate_origin(change(attach(make_tiny_llama(), bank))) == "untrained"


def test_a_step_of_any_optimiser_on_any_layer_makes_them_trained(bank, tmp_path: Path, caplog) -> None:
    save_checkpoint(attach(make_tiny_llama(), bank), tmp_path / "start")
    for model in (attach(make_tiny_llama(), bank), load_checkpoint(tmp_path / "start", make_tiny_llama(), allow_untrained=True)):
        last = [layer.gate for _, layer in meteora_layers(model)][-1]
        optimizer = torch.optim.SGD([last.requires_grad_(True)], lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        caplog.clear()
        save_checkpoint(model, tmp_path / "saved")
        assert "untrained" not in caplog.text
        assert gate_origin(load_checkpoint(tmp_path / "saved", make_tiny_llama())) == "trained"


def test_what_needs_no_training_is_not_refused(bank, make_adapter, tmp_path: Path) -> None:
    save_checkpoint(attach(make_tiny_llama(), bank, init="arrow"), tmp_path / "arrow")
    assert gate_origin(load_checkpoint(tmp_path / "arrow", make_tiny_llama())) == "closed form"
    one = AdapterBank.from_peft({"one": make_adapter("one")})
    save_checkpoint(attach(make_tiny_llama(), one, top_k=1), tmp_path / "one")
    load_checkpoint(tmp_path / "one", make_tiny_llama())
