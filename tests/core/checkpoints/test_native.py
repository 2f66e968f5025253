"""Saving and loading gates: what is there is not lost, what was trained is kept, and what changed is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native import read_config
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.attach import set_trainable
from meteora_core.model.base import BaseReference, load_base
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def bank(make_adapter) -> AdapterBank:
    return AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))})


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_a_folder_of_other_things_is_not_replaced(bank, tmp_path: Path) -> None:
    model = attach(make_tiny_llama(), bank)
    mine, file, empty = tmp_path / "mine", tmp_path / "file", tmp_path / "empty"
    (mine / "data").mkdir(parents=True)
    (mine / "data" / "rows.jsonl").write_text("{}\n")
    file.write_text("text")
    empty.mkdir()
    for place in (mine, file):
        with pytest.raises(UsageError, match="is not a checkpoint, so it is not replaced"):
            save_checkpoint(model, place)
    assert (mine / "data" / "rows.jsonl").read_text() == "{}\n"
    assert file.read_text() == "text"
    for place in (empty, tmp_path / "new" / "deep"):
        save_checkpoint(model, place)
        save_checkpoint(model, place)
        assert read_config(place)["contains"] == ["gates"]


def test_a_link_stays_and_what_it_points_to_is_written(bank, tmp_path: Path) -> None:
    model = attach(make_tiny_llama(), bank)
    disk, link = tmp_path / "disk" / "checkpoint", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    save_checkpoint(model, link)
    assert link.is_symlink()
    assert read_config(disk)["contains"] == ["gates"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "disk" / "later")
    save_checkpoint(model, dangling)
    assert read_config(tmp_path / "disk" / "later")["contains"] == ["gates"]
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".tmp", ".old")]


def test_adapters_that_trained_are_in_the_checkpoint(bank, tmp_path: Path) -> None:
    model = attach(make_tiny_llama(), bank)
    optimizer = torch.optim.SGD(set_trainable(model, "gates+adapters"), lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    set_trainable(model, "none")
    save_checkpoint(model, tmp_path / "saved")
    assert read_config(tmp_path / "saved")["contains"] == ["gates", "adapters"]
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved", make_tiny_llama())), logits(model))


@pytest.mark.parametrize("changes", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=lambda changes: next(iter(changes)))
def test_another_scaling_than_at_training_is_noticed(bank, tmp_path: Path, changes) -> None:
    save_checkpoint(declare_trained(attach(make_tiny_llama(), bank)), tmp_path / "saved")
    load_checkpoint(tmp_path / "saved", make_tiny_llama())
    file = Path(bank.adapters[1].source) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=r"adapter 'b' .* is not as it was .* rank and scaling are 4 and") as caught:
        load_checkpoint(tmp_path / "saved", make_tiny_llama())
    assert "adapter_config.json" in str(caught.value.hint)


def test_scalings_stay_exact_when_the_dtype_changes(make_adapter) -> None:
    bank = AdapterBank.from_peft({"a": make_adapter("a", r=6, lora_alpha=10, use_rslora=True)})
    model = attach(make_tiny_llama(), bank, top_k=1)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    exact = layer.scaling.clone()
    assert not torch.equal(exact.bfloat16().float(), exact), "this one would be rounded"
    model.to(torch.bfloat16)
    assert torch.equal(layer.scaling, exact)
    assert layer.gate.dtype == torch.bfloat16
    model.half().float()
    assert torch.equal(layer.scaling, exact)


def test_what_is_wrong_with_the_model_is_said_as_it_is(bank, tmp_path: Path) -> None:
    save_checkpoint(declare_trained(attach(make_tiny_llama(), bank)), tmp_path / "saved")
    with pytest.raises(UsageError, match="already"):
        load_checkpoint(tmp_path / "saved", attach(make_tiny_llama(), bank))
    with pytest.raises(UsageError, match="nonesuch"):
        load_checkpoint(tmp_path / "saved", make_tiny_llama(), backend="nonesuch")
    with pytest.raises(CheckpointError, match="does not fit this base model"):
        load_checkpoint(tmp_path / "saved", make_tiny_llama(hidden_size=64))


def test_the_base_keeps_the_name_that_it_was_loaded_by(bank, tmp_path: Path) -> None:
    make_tiny_llama().save_pretrained(tmp_path / "base")
    reference = BaseReference(str(tmp_path / "base"), trust_remote_code=True)
    model = load_base(reference)
    model.config._name_or_path = model.name_or_path = "/elsewhere/in/a/cache"
    save_checkpoint(declare_trained(attach(model, bank)), tmp_path / "saved")
    assert read_config(tmp_path / "saved")["base"]["name"] == str(tmp_path / "base")
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved", tmp_path / "base")), logits(model))


def test_a_base_file_that_was_cut_short_is_said_to_be_broken(tmp_path: Path) -> None:
    make_tiny_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    for size in (0, 4, 1000):
        file.write_bytes(file.read_bytes()[:size] if size else b"")
        with pytest.raises(CheckpointError, match="cannot load the model of"):
            load_base(BaseReference(str(tmp_path / "base")))
