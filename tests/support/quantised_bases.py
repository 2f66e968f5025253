"""The weights of a small model in the formats of quantised models, as vLLM reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale in the 4-bit formats."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each 4-bit number of a word of AWQ holds."""


def int8(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors: 8-bit integers, one scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit numbers (h, o) around 8 and their scales (h / GROUP, o)."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() + 8).to(torch.int32).reshape(weight.shape[1], -1), scale[:, 0]


def packed(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight 4-bit numbers along a dimension in each 32-bit word."""
    words = numbers.unflatten(dim, (-1, 8)).to(torch.int64)
    word = sum((words.select(dim + 1, source) << (4 * place) for place, source in enumerate(order)), torch.zeros((), dtype=torch.int64))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).contiguous()


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """GPTQ: words along the inputs."""
    numbers, scale = four_bits(weight)
    zeros = packed(torch.full((len(scale), weight.shape[0]), 7), 1)  # the format stores the zero point minus 1
    return {"qweight": packed(numbers, 0), "scales": scale.half(), "qzeros": zeros, "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP}


def awq(weight: Tensor) -> dict[str, Tensor]:
    """AWQ: words along the outputs."""
    numbers, scale = four_bits(weight)
    zeros = packed(torch.full((len(scale), weight.shape[0]), 8), 1, AWQ_ORDER)
    return {"qweight": packed(numbers, 1, AWQ_ORDER), "scales": scale.half(), "qzeros": zeros}


_EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
FORMATS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "int8": (
        int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "0": {
                    "targets": ["Linear"],
                    "weights": _EIGHT | {"strategy": "channel"},
                    "input_activations": _EIGHT | {"strategy": "token", "dynamic": True},
                }
            },
        },
    ),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}
"""For each format: a function that returns the tensors of a linear layer by their last names, and the ``quantization_config``."""


def quantised(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a model with all its ``*_proj`` weights in a format."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            found |= {f"{name.removesuffix('weight')}{last}": part for last, part in FORMATS[kind][0](tensor.float()).items()}
        else:
            found[name] = tensor
    return found
