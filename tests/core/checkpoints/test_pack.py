"""Packing a checkpoint: adapters inside, some of them, at a size."""

from __future__ import annotations

import json

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native import read_config
from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def source(tmp_path, make_adapter):
    """A checkpoint of gates over three adapters in folders; the second has another rank and targets only attention."""
    folders = {
        "a": make_adapter("a", 0),
        "b": make_adapter("b", 1, r=2, target_modules=["q_proj", "v_proj"]),
        "c": make_adapter("c", 2),
    }
    model = declare_trained(attach(make_tiny_llama(), AdapterBank.from_peft(folders), seed=3))
    save_checkpoint(model, tmp_path / "source", training={"steps": 3, "history": [{"loss": 1.0}], "held_out": {"gate_accuracy": 0.5}, "inputs": {}})
    return tmp_path / "source"


def logits(folder, **state):
    model = load_checkpoint(folder, make_tiny_llama())
    for name, value in state.items():
        setattr(model.meteora, name, value)
    with torch.inference_mode():
        return model(IDS).logits


def test_all_adapters_in_float32_give_the_same_logits_without_their_folders(source, tmp_path) -> None:
    expected = logits(source)
    done = pack_checkpoint(source, tmp_path / "packed", PackOptions(dtype=torch.float32))
    for name in "abc":
        (tmp_path / "adapters" / name).rename(tmp_path / f"gone_{name}")
    assert torch.equal(logits(tmp_path / "packed"), expected)
    assert done.kept == {"a": 1.0, "b": 1.0, "c": 1.0}
    config = read_config(tmp_path / "packed")
    assert config["contains"] == ["gates", "adapters"]
    assert "history" not in config["training"]
    assert config["training"]["packed"]["from"] == read_config(source)["weights_sha256"]


def test_some_tasks_keep_their_gates_and_order(source, tmp_path) -> None:
    model = load_checkpoint(source, make_tiny_llama())
    model.meteora.mute(["b"])
    with torch.inference_mode():
        expected = model(IDS).logits
    done = pack_checkpoint(source, tmp_path / "packed", PackOptions(tasks=["c", "a"], dtype=torch.float32))
    assert done.adapters == ("c", "a")
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="twice"):
        pack_checkpoint(source, tmp_path / "other", PackOptions(tasks=["a", "a"]))
    with pytest.raises(UsageError, match="no adapter named 'd'"):
        pack_checkpoint(source, tmp_path / "other", PackOptions(tasks=["d"]))


def test_a_low_rank_keeps_the_largest_singular_values(source, tmp_path) -> None:
    bank = load_checkpoint(source, make_tiny_llama())
    pack_checkpoint(source, tmp_path / "packed", PackOptions(rank=2, dtype=torch.float32))
    small = load_checkpoint(tmp_path / "packed", make_tiny_llama())
    layer, cut = (model.model.layers[1].mlp.down_proj for model in (bank, small))
    assert cut.ranks == (2, 0, 2)
    whole = layer.lora_B[:4].T @ layer.lora_A[:4]
    u, values, v = torch.linalg.svd(whole)
    best = u[:, :2] * values[:2] @ v[:2]
    torch.testing.assert_close(cut.lora_B[:2].T @ cut.lora_A[:2], best, rtol=1e-4, atol=1e-5)
    assert torch.equal(cut.scaling, layer.scaling)
    assert small.model.layers[0].self_attn.q_proj.ranks == (2, 2, 2)


def test_a_rank_above_a_layers_width(tmp_path, make_adapter) -> None:
    """k and v have 16 outputs and adapters of rank 24: no more than 16 singular values."""
    names = {name: make_adapter(name, seed, r=24, target_modules=["k_proj", "q_proj"]) for seed, name in enumerate("ab")}
    save_checkpoint(declare_trained(attach(make_tiny_llama(), AdapterBank.from_peft(names), seed=3)), tmp_path / "source")
    expected = logits(tmp_path / "source")
    pack_checkpoint(tmp_path / "source", tmp_path / "packed", PackOptions(rank=20, dtype=torch.float32))
    ranks = {path.rpartition(".")[2]: module["ranks"] for path, module in read_config(tmp_path / "packed")["modules"].items()}
    assert ranks == {"k_proj": [16, 16], "q_proj": [20, 20]}
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=0.05, atol=0.05)
    pack_checkpoint(tmp_path / "source", tmp_path / "small", PackOptions(max_bytes=90_000))


def test_a_size_is_kept_and_what_is_lost_is_said(source, tmp_path) -> None:
    whole = pack_checkpoint(source, tmp_path / "whole")
    limit = whole.size + 64_000 + 2_000 - 4_000
    done = pack_checkpoint(source, tmp_path / "packed", PackOptions(max_bytes=limit))
    assert done.size <= limit
    assert all(0.3 < share <= 1 for share in done.kept.values())
    assert min(done.kept.values()) < 1
    config = json.loads((tmp_path / "packed" / "meteora_config.json").read_text())
    assert config["training"]["packed"]["kept"] == done.kept
    assert logits(tmp_path / "packed").isfinite().all()
    with pytest.raises(CheckpointError, match="even rank 1"):
        pack_checkpoint(source, tmp_path / "tiny", PackOptions(max_bytes=66_000))
    assert not (tmp_path / "tiny").exists()


def test_what_is_there_is_replaced_only_on_request(source, tmp_path) -> None:
    pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(UsageError, match="exists already"):
        pack_checkpoint(source, tmp_path / "packed")
    pack_checkpoint(source, tmp_path / "packed", overwrite=True)
    (tmp_path / "other" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="not a checkpoint"):
        pack_checkpoint(source, tmp_path / "other", overwrite=True)
