"""A forced adapter computes what PEFT computes, in models of many architectures and for every kind of adapter that a bank takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import AdapterBank, attach, record_routes
from meteora_core.errors import AdapterError, UsageError
from support.architectures import ARCHITECTURES, BY_KIND, make_model, save_lora

IDS = torch.arange(3, 27).reshape(2, 12)
CLOSE = 1e-5


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def difference(kind: str, folder: Path, **settings: Any) -> tuple[float, float]:
    """The largest difference of a forced adapter's logits from PEFT's, and from the base model's."""
    target = {"target_modules": list(BY_KIND[kind].targets), **settings}
    theirs = logits(save_lora(make_model(kind), folder / "one", 1, **target))
    save_lora(make_model(kind), folder / "two", 2, **target)
    base = make_model(kind)
    plain = logits(base)
    model = attach(base, AdapterBank.from_peft({"two": folder / "two", "one": folder / "one"}), backend="dense")
    with model.meteora.force("one"):
        ours = logits(model)
    return float((ours - theirs).abs().max()), float((ours - plain).abs().max())


@pytest.mark.parametrize("kind", [each.kind for each in ARCHITECTURES])
def test_plain_lora(tmp_path: Path, kind: str) -> None:
    from_peft, from_base = difference(kind, tmp_path)
    assert from_peft <= CLOSE
    assert from_base > 1e-3


FIVE = ("llama", "qwen3", "gemma2", "phi3", "gpt2")
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.o_proj": 2, "h.0.attn.c_proj": 2}, "alpha_pattern": {"down_proj": 20, "c_fc": 20}},
    "lm_head": {},
    "whole lm_head": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("kind", FIVE)
def test_other_kinds_of_lora(tmp_path: Path, kind: str, name: str) -> None:
    settings = dict(KINDS[name])
    if name == "lm_head":
        settings["target_modules"] = [*BY_KIND[kind].targets, "lm_head"]
    from_peft, from_base = difference(kind, tmp_path, **settings)
    assert from_peft <= CLOSE
    assert from_base > 1e-3


@pytest.mark.parametrize("kind", [each.kind for each in ARCHITECTURES if each.parameters])
def test_experts_in_one_tensor(tmp_path: Path, kind: str) -> None:
    """With attention beside them, as ``target_parameters`` are trained."""
    settings = {"target_modules": ["o_proj"], "target_parameters": list(BY_KIND[kind].parameters), "rank_pattern": {"experts.down_proj": 2}}
    from_peft, from_base = difference(kind, tmp_path, **settings)
    assert from_peft <= CLOSE
    assert from_base > 1e-3


def test_gates_of_experts_cannot_be_trained(tmp_path: Path) -> None:
    """The reason is given before any work is done; routing by untrained or Arrow gates, and forcing one adapter, need no labels."""
    save_lora(make_model("mixtral"), tmp_path / "x", target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    model = attach(make_model("mixtral"), AdapterBank.from_peft({"x": tmp_path / "x", "y": tmp_path / "x"}), init="arrow")
    assert logits(model).isfinite().all()
    with model.meteora.force(torch.tensor([0, 1])), pytest.raises(UsageError, match="several experts"):
        logits(model)
    with pytest.raises(UsageError, match="labelling or recording routes cannot tell which tokens"), record_routes(model):
        logits(model)


def test_experts_without_a_known_layout_are_refused(tmp_path: Path) -> None:
    save_lora(make_model("mixtral"), tmp_path / "x", target_modules=[], target_parameters=["experts.down_proj"])
    bank = AdapterBank.from_peft({"x": tmp_path / "x"})
    with pytest.raises(AdapterError, match=r"adapters target model\.layers\.0\.mlp\.experts\.down_proj, .* which LlamaForCausalLM does not have"):
        attach(make_model("llama"), bank, top_k=1)
    model = make_model("mixtral")
    for layer in model.model.layers:
        del layer.mlp.experts.is_transposed
    with pytest.raises(AdapterError, match="MixtralExperts does not describe its layout"):
        attach(model, bank, top_k=1)
