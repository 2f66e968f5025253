"""Reading and stacking PEFT folders; everything that cannot be stacked is refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach
from meteora_core.adapters.peft_folder import read_adapter
from meteora_core.errors import AdapterError, UsageError
from meteora_core.routing import meteora_of
from support.tiny_models import make_tiny_llama

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
D = "model.layers.1.mlp.down_proj"


def change(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_mixed_ranks_alphas_and_targets_are_stacked_in_order(make_adapter) -> None:
    one = make_adapter("one", 1)
    two = make_adapter("two", 2, r=2, lora_alpha=6, target_modules=["q_proj"])
    three = make_adapter("three", 3, r=6, use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5})
    bank = AdapterBank.from_peft({"b": one, "a": two, "c": three})
    assert bank.names == ("b", "a", "c")
    assert len(bank) == 3
    q = bank.modules[Q]
    assert q.ranks == (4, 2, 6)
    assert q.A.shape == (12, 32)
    assert q.B.shape == (12, 32)
    assert q.scaling.tolist() == pytest.approx([2.0, 3.0, 8 / math.sqrt(6)])
    raw = load_file(two / "adapter_model.safetensors")
    torch.testing.assert_close(q.A[4:6], raw[f"base_model.model.{Q}.lora_A.weight"])
    torch.testing.assert_close(q.B[4:6], raw[f"base_model.model.{Q}.lora_B.weight"].t())
    v = bank.modules[V]
    assert v.ranks == (4, 0, 3)
    assert v.scaling.tolist() == pytest.approx([2.0, 0.0, 5 / math.sqrt(3)])
    assert [bank.adapters[i].rank for i in range(3)] == [4, 2, 6]
    assert all(stack.A.is_contiguous() and stack.B.is_contiguous() for stack in bank.modules.values())


def test_layers_are_in_their_natural_order(make_adapter) -> None:
    folder = make_adapter("deep", llama={"num_hidden_layers": 12}, target_modules=["q_proj"])
    numbers = [int(path.split(".")[2]) for path in AdapterBank.from_peft({"deep": folder}).modules]
    assert numbers == list(range(12))


def test_a_base_is_recognised_whatever_the_order_of_the_layers(make_adapter) -> None:
    bank = AdapterBank.from_peft({"deep": make_adapter("deep", llama={"num_hidden_layers": 12})})
    turned = AdapterBank(bank.adapters, dict(reversed(bank.modules.items())))
    probes = [meteora_of(attach(make_tiny_llama(num_hidden_layers=12), each, top_k=1)).provenance.base_probe for each in (bank, turned)]
    assert len(set(probes[0] or ())) > 16
    assert probes[0] == probes[1]


def test_names_are_looked_up(make_adapter) -> None:
    bank = AdapterBank.from_peft({"gsm8k": make_adapter("gsm8k")})
    assert bank.index("gsm8k") == 0
    with pytest.raises(UsageError, match="gsm8") as caught:
        bank.index("gsm8")
    assert "gsm8k" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "no DoRA magnitude, and use_dora is true"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changed its base model"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"lora_bias": True}, "no bias of lora_B, and lora_bias is true"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias together with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "no weights for lm_head, which modules_to_save"),
        ({"target_parameters": ["experts.down_proj"]}, "no weights for experts.down_proj, which target_parameters"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(make_adapter, changes, message) -> None:
    folder = make_adapter("x")
    change(folder, **changes)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter("x", folder)
    assert "'x'" in caught.value.message


def test_embedding_adapters_are_refused(make_adapter) -> None:
    folder = make_adapter("x")
    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}, weights)
    with pytest.raises(AdapterError, match="embedding"):
        read_adapter("x", folder)


def test_missing_and_broken_files(make_adapter, tmp_path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter("x", tmp_path / "none")
    with pytest.raises(AdapterError, match="no adapters given"):
        AdapterBank.from_peft({})
    folder = make_adapter("x")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter("x", folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter("x", folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="holds no"):
        read_adapter("x", folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json:1:"):
        read_adapter("x", folder)


def test_half_a_pair_and_foreign_tensors(make_adapter) -> None:
    folder = make_adapter("x")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = f"base_model.model.{D}.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj has lora_A but not the other matrix"):
        read_adapter("x", folder)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.zeros(2)}, weights)
    with pytest.raises(AdapterError, match=r"norm\.weight is not a LoRA weight"):
        read_adapter("x", folder)


def test_adapters_of_two_bases_do_not_stack(make_adapter) -> None:
    with pytest.raises(AdapterError, match=r"mlp\.\w+: adapter 'a' maps .* 'b' maps") as caught:
        AdapterBank.from_peft({"a": make_adapter("a"), "b": make_adapter("b", llama={"intermediate_size": 40})})
    assert "same base" in str(caught.value.hint)
