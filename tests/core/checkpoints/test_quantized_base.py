"""Adapters on top of a base model whose linears hold integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from meteora_core import AdapterBank, attach, detach, load_authors_checkpoint, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.convert import convert_authors
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.base import BaseReference, load_base
from meteora_core.model.quantized import quantized_loading

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])}


class Int8Linear(nn.Linear):
    """A linear whose weight is int8 with one scale a row; the product is taken with the dequantised weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized())


def quantize(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(module))
    return model


def dequantize(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, name = path.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = module.dequantized()
            setattr(model.get_submodule(parent), name, plain)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def test_adapters_attach_to_integer_linears(make_authors: Callable[..., Any], tmp_path: Path) -> None:
    made = make_authors(count=3)
    folders = {name: made.adapters / name for name in made.names}
    quantized = quantize(LlamaForCausalLM.from_pretrained(made.base))
    plain = dequantize(quantize(LlamaForCausalLM.from_pretrained(made.base)))
    before = logits(quantized)
    for model in (quantized, plain):
        attach(model, AdapterBank.from_peft(folders), seed=3)
    assert quantized.model.layers[0].mlp.up_proj.gate.dtype == torch.float32
    torch.testing.assert_close(logits(quantized), logits(plain), atol=1e-5, rtol=1e-5)
    assert (logits(quantized) - before).abs().max() > 0.1
    quantized(**BATCH).logits.sum().backward()
    assert quantized.model.layers[0].mlp.up_proj.gate.grad is not None
    quantized.meteora.gates = "trained"  # random ones do here
    save_checkpoint(quantized, tmp_path / "native")
    again = load_checkpoint(tmp_path / "native", quantize(LlamaForCausalLM.from_pretrained(made.base)))
    assert torch.equal(logits(again), logits(quantized))
    assert torch.equal(logits(detach(quantized)), before)


def test_an_authors_checkpoint_leaves_integer_linears_alone(make_authors: Callable[..., Any], tmp_path: Path) -> None:
    made = make_authors(count=3, change=("model.norm.weight", "model.layers.0.mlp.up_proj.weight"))
    base = quantize(LlamaForCausalLM.from_pretrained(made.base))
    own = base.model.layers[0].mlp.up_proj.weight.clone()
    model = load_authors_checkpoint(base, made.adapters, made.checkpoint)
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, own)
    assert torch.equal(model.model.norm.weight, made.tensors["base_model.model.model.norm.weight"])
    convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters)
    fresh = quantize(LlamaForCausalLM.from_pretrained(made.base))
    with pytest.raises(CheckpointError, match=r"cannot take model\.layers\.0\.mlp\.up_proj\.weight"):
        load_checkpoint(tmp_path / "native", fresh)
    assert getattr(fresh, "meteora", None) is None


def test_what_quantised_loading_needs_is_said(make_authors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_authors(count=2)
    with pytest.raises(UsageError, match="unknown quantisation '3bit'"):
        load_base(BaseReference(str(made.base)), quantization="3bit")
    with pytest.raises(UsageError, match="a 4bit base model needs a CUDA GPU, and the device is cpu"):
        load_base(BaseReference(str(made.base)), quantization="4bit", device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("meteora_core.model.quantized.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as caught:
        quantized_loading("8bit", torch.bfloat16, torch.device("cuda"))
    assert caught.value.hint == "pip install 'meteora-lora[quantized]'"
    monkeypatch.setattr("meteora_core.model.quantized.find_spec", lambda name: object())
    passed = quantized_loading("4bit", torch.bfloat16, torch.device("cuda:1"))
    assert (passed["device_map"], passed["quantization_config"].bnb_4bit_compute_dtype) == ({"": 1}, torch.bfloat16)
