"""Base models that torchao or compressed-tensors quantised: adapters run on top of the library's products."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meteora_core import AdapterBank, attach, detach, load_checkpoint, save_checkpoint
from meteora_core.fused.fuse import _can_fuse
from meteora_core.generation.fixed_cache import can_be_fixed
from meteora_core.model.attach import meteora_layers
from meteora_core.tensors import is_quantized
from support.tiny_models import declare_trained, make_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of the libraries at import

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def by_torchao(kind: str) -> Callable[[nn.Module, Path], nn.Module]:
    def quantize(model: nn.Module, folder: Path) -> nn.Module:
        library = pytest.importorskip("torchao.quantization")
        config = {"int8": library.Int8WeightOnlyConfig, "float8": library.Float8WeightOnlyConfig}[kind]()
        library.quantize_(model, config, lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path)
        return model

    return quantize


def by_compressed_tensors(bits: int) -> Callable[[nn.Module, Path], nn.Module]:
    """Weights of 8-bit floating-point numbers with a scale for each row, or of 4-bit integers with one for every 16 columns, loaded from a folder."""

    def quantize(model: Any, folder: Path) -> nn.Module:
        library = pytest.importorskip("compressed_tensors.quantization")
        from compressed_tensors.compressors import ModelCompressor
        from transformers import AutoModelForCausalLM

        kind: dict[str, Any] = {"type": "float", "strategy": "channel"} if bits == 8 else {"type": "int", "strategy": "group", "group_size": 16}
        scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(num_bits=bits, symmetric=True, **kind))
        form = "float-quantized" if bits == 8 else "pack-quantized"
        frozen = library.QuantizationStatus.FROZEN
        config = library.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status=frozen, format=form)
        library.apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                largest = module.weight.abs().unflatten(1, (-1, module.in_features if bits == 8 else 16)).amax(2)
                module.weight_scale.data = (largest / (448 if bits == 8 else 7)).to(module.weight_scale.dtype)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
        return loaded

    return quantize


CASES = [
    pytest.param(by_torchao("int8"), True, id="torchao-int8"),
    pytest.param(by_torchao("float8"), True, id="torchao-float8"),
    pytest.param(by_compressed_tensors(8), False, id="compressed-tensors-float8"),
    pytest.param(by_compressed_tensors(4), False, id="compressed-tensors-int4"),
]


@pytest.mark.parametrize(("quantize", "stays"), CASES)
def test_adapters_run_on_top_of_quantised_products(quantize: Any, stays: bool, make_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each layer adds to the library's output what it adds to any output; groups leave layers alone whose weights stay quantised."""
    caplog.set_level(logging.ERROR)
    bank = AdapterBank.from_peft({name: make_adapter(name, seed, r=4, target_modules=TARGETS) for seed, name in enumerate(("one", "two"))})
    model = quantize(make_tiny_llama().bfloat16(), tmp_path / "quantized")
    before = logits(model)
    attach(model, bank)
    seen: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [layer.register_forward_hook(lambda layer, given, output: seen.append((layer, given[0], output))) for _, layer in meteora_layers(model)]
    found = logits(model)
    for hook in hooks:
        hook.remove()
    assert float((found - before).abs().max()) > 0.01
    assert len(seen) == 14
    for layer, x, output in seen:
        base = layer.base_layer(x)
        indices = (x.float() @ layer.gate.float().t()).softmax(-1)
        added = sum(
            indices[..., adapter : adapter + 1] * layer.scaling[adapter] * ((x.float() @ layer.lora_A[rows].float().t()) @ layer.lora_B[rows].float())
            for adapter, rows in enumerate((slice(0, 4), slice(4, 8)))
        )
        torch.testing.assert_close(output.float(), base.float() + added.detach(), rtol=2e-2, atol=2e-2)
        assert is_quantized(layer.weight) == stays
        assert _can_fuse(layer) != stays
    assert can_be_fixed(model)
    model.config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")
    vars(model)["is_quantized"] = True
    assert not can_be_fixed(model)
    with model.meteora.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(detach(model)), before)


@pytest.mark.parametrize("quantize", [pytest.param(by_torchao("int8"), id="torchao-int8")])
def test_a_checkpoint_on_a_quantised_base_loads_again(quantize: Any, make_adapter: Any, tmp_path: Path) -> None:
    bank = AdapterBank.from_peft({name: make_adapter(name, seed, r=4, target_modules=TARGETS) for seed, name in enumerate(("one", "two"))})
    model = declare_trained(attach(quantize(make_tiny_llama().bfloat16(), tmp_path), bank))
    save_checkpoint(model, tmp_path / "mine")
    again = load_checkpoint(tmp_path / "mine", quantize(make_tiny_llama().bfloat16(), tmp_path))
    assert torch.equal(logits(again), logits(model))
