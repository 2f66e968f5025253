"""Settings for base models that bitsandbytes quantises; adapters attach to their linear layers as to any others."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from meteora_core.errors import UsageError

QUANTIZATIONS: tuple[str, ...] = ("4bit", "8bit")


def quantized_loading(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that load a quantised model.

    Args:
        quantization: "4bit" for NF4 with double quantisation, which computes in ``dtype``, or "8bit" for LLM.int8(), which computes in float16.
        dtype: Data type of the weights that are not quantised.
        device: A CUDA device.

    Raises:
        UsageError: The quantisation is unknown, the device is not an available GPU, or bitsandbytes is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"unknown quantisation {quantization!r}", hint=f"choose from: {', '.join(QUANTIZATIONS)}")
    article = "an" if quantization == "8bit" else "a"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(f"{article} {quantization} base model needs a CUDA GPU, and the device is {device}", hint="leave out the quantisation on this machine")
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{article} {quantization} base model needs bitsandbytes, which is not installed", hint="pip install 'meteora-lora[quantized]'")
    from transformers import BitsAndBytesConfig

    if quantization == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device.index or 0}}
