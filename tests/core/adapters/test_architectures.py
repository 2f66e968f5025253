"""A forced adapter computes what PEFT computes, in models of many architectures and for every kind of adapter that a bank takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import AdapterBank, attach
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
