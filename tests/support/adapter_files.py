"""PEFT folders for the tiny Llama, written without PEFT: in a millisecond, and broken as a test wants them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "down_proj"]}
"""Of the adapters that :func:`write_adapter` makes."""

SHAPES = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32)}
"""Linear -> features in and out."""

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def lora_key(path: str, side: str) -> str:
    """The name of ``lora_A`` or ``lora_B`` of a module in the file."""
    return f"base_model.model.{path}.lora_{side}.weight"


def lora_tensors(seed: int = 0, rank: int = 4) -> dict[str, Tensor]:
    """Random weights for both linears of both layers."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for layer in (0, 1):
        for name, (width, out) in SHAPES.items():
            path = f"model.layers.{layer}.{name}"
            made[lora_key(path, "A")] = torch.randn(rank, width, generator=draw) * 0.3
            made[lora_key(path, "B")] = torch.randn(out, rank, generator=draw) * 0.3
    return made


def write_adapter(folder: Path, tensors: Mapping[str, Tensor] | None = None, *, text: str | None = None, **config: Any) -> Path:
    """Write a PEFT folder.

    Args:
        folder: Where to.
        tensors: None takes :func:`lora_tensors`.
        text: Of adapter_config.json; None is :data:`CONFIG` with the changes.
        config: Changes of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}) if text is None else text)
    save_file(dict(lora_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def raw_safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header: a JSON-able value, or its bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
