"""One ordinary PEFT LoRA folder: what can be stacked is read, the rest is refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meteora_core.errors import AdapterError
from meteora_core.files import read_json, sha256

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of one adapter; kept in checkpoints so that a loaded model is the trained one.

    Attributes:
        name: Its name in the bank (a task name, as a rule).
        source: The folder it was read from.
        sha256: Hash of its weight file.
        base: The base model that its configuration names, if any.
        rank: The usual rank (``r``); single modules may differ.
        alpha: ``lora_alpha``.
        rslora: Whether the scaling is alpha / sqrt(r).
        dropout: ``lora_dropout`` it was trained with.
    """

    name: str
    source: str
    sha256: str
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float


@dataclass(frozen=True)
class LoraWeights:
    """One adapter on one linear: ``A`` (r, in), ``B`` (out, r), and the scaling."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """One adapter: what it is, and its weights by module path (``model.layers.0.self_attn.q_proj``)."""

    info: AdapterInfo
    modules: dict[str, LoraWeights]


def read_adapter(name: str, folder: str | Path) -> Adapter:
    """Read a PEFT LoRA folder (``adapter_config.json`` and ``adapter_model.safetensors``) onto the CPU.

    Args:
        name: The name it gets.
        folder: The folder.

    Returns:
        The adapter, its tensors in the dtype of the file.

    Raises:
        AdapterError: The folder is missing or broken, holds pickled weights only, or is of a kind that cannot be stacked (DoRA, bias,
            modules_to_save, embeddings, other PEFT methods); the reason is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {name!r}: no such folder: {folder}", hint="train it with `meteora train --stage adapters`, or correct the path")
    config = read_json(folder / CONFIG, error=AdapterError, hint=f"{folder} should be a folder written by PEFT's save_pretrained")
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {name!r}: {folder / CONFIG} is not a JSON object")
    _refuse_unsupported(name, config)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = next((file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")), None)
        if pickled:
            raise AdapterError(f"adapter {name!r}: {pickled} is a pickle file, which is never read", hint="save it again as safetensors with a recent PEFT")
        raise AdapterError(f"adapter {name!r}: {folder} holds no {WEIGHTS}")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as broken:
        raise AdapterError(f"adapter {name!r}: {weights} cannot be read: {broken}", hint="copy or download the file again") from broken
    modules = _pair(name, tensors, config)
    info = AdapterInfo(
        name=name,
        source=str(folder),
        sha256=sha256(weights),
        base=config.get("base_model_name_or_path"),
        rank=int(config.get("r", 8)),
        alpha=float(config.get("lora_alpha", 8)),
        rslora=bool(config.get("use_rslora", False)),
        dropout=float(config.get("lora_dropout", 0.0)),
    )
    return Adapter(info, modules)


_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that subtract from the base model, or quantise it, each time the adapter is put on."""


def _refuse_unsupported(name: str, config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise AdapterError(f"adapter {name!r} is a {kind} adapter; only LORA can be stacked")
    start = config.get("init_lora_weights")
    reasons = {
        "DoRA (use_dora)": config.get("use_dora"),
        "QALoRA (use_qalora)": config.get("use_qalora"),
        f"bias={config.get('bias')!r}": config.get("bias", "none") != "none",
        "lora_bias": config.get("lora_bias"),
        f"modules_to_save={config.get('modules_to_save')}": config.get("modules_to_save"),
        f"target_parameters={config.get('target_parameters')}": config.get("target_parameters"),
        f"trainable_token_indices={config.get('trainable_token_indices')}": config.get("trainable_token_indices"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        f"init_lora_weights={start!r}, which changed its base model": isinstance(start, str) and start.startswith(_CHANGES_BASE),
        "activated LoRA (alora_invocation_tokens)": config.get("alora_invocation_tokens"),
    }
    for reason, present in reasons.items():
        if present:
            raise AdapterError(f"adapter {name!r} uses {reason}, which cannot be stacked", hint="train a plain LoRA: bias='none', no DoRA, no modules_to_save")


def _pattern(patterns: dict[str, Any], path: str, default: float) -> float:
    """PEFT's rank_pattern / alpha_pattern: a key matches the end of a module path, as a regular expression."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(value)
    return default


def _pair(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, LoraWeights]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key.removeprefix(_PREFIX))
        if match is None:
            what = "an embedding adapter" if "lora_embedding" in key else "not a LoRA weight"
            raise AdapterError(f"adapter {name!r}: {key} is {what}; it cannot be stacked")
        if tensor.ndim != 2:
            raise AdapterError(f"adapter {name!r}: {key} has shape {tuple(tensor.shape)}; only adapters of linear layers can be stacked")
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterError(f"adapter {name!r} holds no weights")
    modules = {}
    for path, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"adapter {name!r}: {path} has lora_{next(iter(pair))} but not its partner")
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank or rank == 0:
            raise AdapterError(f"adapter {name!r}: {path} has A {tuple(pair['A'].shape)} and B {tuple(pair['B'].shape)}, whose ranks differ or are 0")
        alpha = _pattern(config.get("alpha_pattern") or {}, path, float(config.get("lora_alpha", 8)))
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        modules[path] = LoraWeights(pair["A"], pair["B"], scaling)
    return modules
