"""One adapter with PEFT: the same numbers as PEFT's own loading if that is right, and an error if PEFT would silently ignore weights."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from peft import PeftModel

from meteora_core import AdapterBank, attach
from meteora_core.errors import AdapterError
from meteora_core.evaluation.adapters import check_adapter, with_adapter
from support.adapter_files import DOWN, Q, lora_key, lora_tensors, raw_safetensors, write_adapter
from support.architectures import save_lora
from support.tiny_models import make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


def by_peft(folder) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(make_tiny_llama(), str(folder), autocast_adapter_dtype=False).eval()(IDS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 10},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "^model.layers.1.mlp.down_proj": 7.5}, "lora_dropout": 0.5},
        {"target_modules": r".*\.(q_proj|down_proj)"},
    ],
)
def test_it_is_what_peft_and_the_bank_make_of_the_folder(tmp_path, changes) -> None:
    folder = write_adapter(tmp_path / "x", **changes)
    base = make_tiny_llama()
    with torch.inference_mode():
        before = base(IDS).logits
        with with_adapter(base, folder) as model:
            got = model(IDS).logits
        after = base(IDS).logits
        bank = attach(make_tiny_llama(), AdapterBank.from_peft({"x": folder}), top_k=1)(IDS).logits
    assert torch.equal(got, by_peft(folder))
    assert torch.equal(before, after)
    assert not torch.allclose(got, before)
    torch.testing.assert_close(bank, got, rtol=1e-4, atol=1e-5)


def test_ranks_may_differ_by_module(tmp_path) -> None:
    tensors = lora_tensors(rank=4) | {key: value for key, value in lora_tensors(rank=2).items() if "layers.1" in key and "q_proj" in key}
    folder = write_adapter(tmp_path / "x", tensors, rank_pattern={"layers.1.self_attn.q_proj": 2})
    with torch.inference_mode(), with_adapter(make_tiny_llama(), folder) as model:
        assert torch.equal(model(IDS).logits, by_peft(folder))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_with_more_than_plain_lora(tmp_path, settings) -> None:
    def fresh():
        return make_tiny_llama(attention_bias=True)

    theirs = save_lora(fresh(), tmp_path / "x", target_modules=["q_proj", "down_proj"], **settings)
    base = fresh()
    with torch.inference_mode():
        with with_adapter(base, tmp_path / "x") as model:
            torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
        assert torch.equal(base(IDS).logits, fresh()(IDS).logits)


def test_an_adapter_in_a_sub_folder_is_used(tmp_path) -> None:
    write_adapter(tmp_path / "x" / "default")
    check_adapter(tmp_path / "x")
    with torch.inference_mode(), with_adapter(make_tiny_llama(), tmp_path / "x") as model:
        assert torch.equal(model(IDS).logits, by_peft(tmp_path / "x" / "default"))


def without(*lost: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in lora_tensors().items() if name not in lost}


BROKEN = {
    "no tensors": ({}, {}),
    "other layers": ({name.replace("layers.", "layers.7"): tensor for name, tensor in lora_tensors().items()}, {}),
    "other shapes": ({name: torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor for name, tensor in lora_tensors().items()}, {}),
    "B is missing": (without(lora_key(Q, "B")), {}),
    "a module is missing": (without(lora_key(DOWN, "A"), lora_key(DOWN, "B")), {}),
    "one tensor more": (lora_tensors() | {"base_model.model.model.norm.weight": torch.ones(32)}, {}),
    "another key": (lora_tensors() | {"evil": torch.ones(1)}, {}),
    "integers": (lora_tensors() | {lora_key(Q, "A"): torch.ones(4, 32, dtype=torch.int8)}, {}),
    "NaN": (lora_tensors() | {lora_key(Q, "A"): torch.full((4, 32), torch.nan)}, {}),
    "IA3": (None, {"peft_type": "IA3"}),
    "OFT": (None, {"peft_type": "OFT"}),
    "DoRA": (None, {"use_dora": True}),
    "PiSSA": (None, {"init_lora_weights": "pissa"}),
    "bias of a norm": (lora_tensors() | {"base_model.model.model.norm.bias": torch.ones(32)}, {"bias": "all"}),
    "modules_to_save": (None, {"modules_to_save": ["lm_head"]}),
    "another rank": (None, {"r": 8}),
    "replication": (None, {"layer_replication": [[0, 2], [0, 2]]}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_peft_would_pass_over_is_refused(tmp_path, name) -> None:
    tensors, changes = BROKEN[name]
    folder = write_adapter(tmp_path / "x", tensors, **changes)
    base = make_tiny_llama()
    with pytest.raises(AdapterError) as caught, with_adapter(base, folder):
        pass
    assert "\n" not in caught.value.message
    assert not any("lora" in key for key, _ in base.named_parameters())
    if name not in ("other layers", "other shapes", "a module is missing"):  # only the base model reveals these faults
        with pytest.raises(AdapterError):
            check_adapter(folder)


@pytest.mark.parametrize("raw", [b"", b"\0" * 8, b"\xff" * 64, raw_safetensors(b"{"), raw_safetensors({"a": 1})], ids=range(5))
def test_a_broken_file_is_refused_in_one_line(tmp_path, raw) -> None:
    folder = write_adapter(tmp_path / "x")
    (folder / "adapter_model.safetensors").write_bytes(raw)
    for use in (lambda: check_adapter(folder), lambda: with_adapter(make_tiny_llama(), folder).__enter__()):
        with pytest.raises(AdapterError) as caught:
            use()
        assert "\n" not in caught.value.message


def test_what_is_not_there_is_said(tmp_path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(AdapterError, match="no adapter at"):
            check_adapter(folder)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterError, match="is a pipe, not a file"):
        check_adapter(tmp_path)


def test_what_peft_cannot_place_is_an_error_and_the_base_stays(tmp_path, monkeypatch) -> None:
    import peft

    folder, base = write_adapter(tmp_path / "x"), make_tiny_llama()
    load = peft.set_peft_model_state_dict
    monkeypatch.setattr(
        peft, "set_peft_model_state_dict", lambda model, state: load(model, {key.replace("q_proj", "k_proj"): value for key, value in state.items()})
    )
    with pytest.raises(AdapterError, match=r"has no layer for .*q_proj"), with_adapter(base, folder):
        pass
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda model, state: (_ for _ in ()).throw(ValueError("Cannot convert\nmore")))
    with pytest.raises(AdapterError, match=r"onto this base model: Cannot convert$"), with_adapter(base, folder):
        pass
    assert not any("lora" in key for key, _ in base.named_parameters())
