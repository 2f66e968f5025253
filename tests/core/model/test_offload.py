"""Base models that accelerate keeps partly on the CPU or on disk."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from meteora_core import AdapterBank, attach, detach, load_checkpoint, save_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.attach import meteora_layers
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)
MAP = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.fixture
def bank(make_adapter) -> AdapterBank:
    return AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))})


@pytest.fixture
def offloaded(tmp_path: Path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=MAP, offload_folder=tmp_path / "disk", dtype=torch.float32).eval()


@torch.no_grad()
def test_a_base_partly_on_disk_computes_saves_and_loads(offloaded, bank, tmp_path: Path) -> None:
    plain = declare_trained(attach(make_tiny_llama(), bank, seed=3))
    expected = plain(IDS).logits
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta
    before = offloaded(IDS).logits
    attach(offloaded, bank, seed=3)
    assert not any(layer.gate.is_meta or layer.scaling.is_meta for _, layer in meteora_layers(offloaded))
    torch.testing.assert_close(offloaded(IDS).logits, expected)
    assert offloaded.meteora.provenance.base_probe == plain.meteora.provenance.base_probe
    save_checkpoint(declare_trained(offloaded), tmp_path / "saved", adapters=True)
    assert torch.equal(load_checkpoint(tmp_path / "saved", make_tiny_llama())(IDS).logits, expected)
    assert torch.equal(detach(offloaded)(IDS).logits, before)
    torch.testing.assert_close(load_checkpoint(tmp_path / "saved", offloaded)(IDS).logits, expected)
    detach(offloaded)
    save_checkpoint(declare_trained(attach(make_tiny_llama(9), bank)), tmp_path / "other")
    with pytest.raises(CheckpointError, match="are not those that"):
        load_checkpoint(tmp_path / "other", offloaded)


@torch.no_grad()
def test_a_model_offloaded_after_adapters_were_attached_computes_and_saves(bank, tmp_path: Path) -> None:
    model = declare_trained(attach(make_tiny_llama(), bank, seed=3))
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(IDS).logits, expected)
    save_checkpoint(model, tmp_path / "saved", adapters=True)
    assert torch.equal(load_checkpoint(tmp_path / "saved", make_tiny_llama())(IDS).logits, expected)


def test_a_model_without_weights_is_refused(bank) -> None:
    with torch.device("meta"):
        model = make_tiny_llama()
    with pytest.raises(UsageError, match=r'_proj is on the device "meta"'):
        attach(model, bank)
    assert not list(meteora_layers(model))
