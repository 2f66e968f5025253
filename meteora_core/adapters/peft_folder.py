"""Reads and checks a PEFT LoRA folder, and refuses adapters that cannot be stacked.

Banks, the evaluation of single adapters, chat and Arrow all read adapters through :func:`read_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.config import CONFIG, WEIGHTS, AdapterConfig, find_adapter, read_adapter_config
from meteora_core.adapters.magnitudes import check_tensor, refuse_peak
from meteora_core.adapters.stack import Pending
from meteora_core.adapters.tensor_names import BaseCopy, read_names
from meteora_core.data.frames import Frame, read_frame
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.fetch.hub_names import hub_source
from meteora_core.files import sha256
from meteora_core.reading import is_regular
from meteora_core.tensor_files import PICKLES, TensorEntry, read_header

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "AdapterInfo", "BaseCopy", "LoraWeights", "check_adapter", "find_adapter", "read_adapter"]

_SAID = {"A": "lora_A", "B": "lora_B", "shift": "the bias of lora_B", "magnitude": "the DoRA magnitude", "bias": "the bias"}
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class AdapterInfo:
    """The description of one adapter, which checkpoints record so that a loaded model equals the trained one.

    Attributes:
        name: The adapter's name in the bank, usually the name of its task.
        source: The folder that the adapter was read from; for the hub's cache, ``hf://`` and the repository with its commit.
        sha256: The SHA-256 of the weight file; empty if the weights come from a checkpoint.
        base: The base model that the configuration names, if any.
        rank: The rank (``r``) of modules without a rank in ``rank_pattern``.
        alpha: The alpha (``lora_alpha``) of modules without an alpha in ``alpha_pattern``.
        rslora: Whether the scaling is alpha / sqrt(r).
        dropout: The dropout probability in training (``lora_dropout``).
        frame: The text around the user's text in the prompts of the training rows; None if unknown.
    """

    name: str
    source: str
    sha256: str
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    frame: Frame | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry for a checkpoint's configuration; without a frame if none is known."""
        values = asdict(replace(self, frame=None))
        return {**values, "frame": self.frame.to_json()} if self.frame else {name: value for name, value in values.items() if name != "frame"}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> AdapterInfo:
        """Return the description of an adapter from a validated entry of a checkpoint's configuration."""
        known = {field.name: entry[field.name] for field in fields(cls) if field.name != "frame"}
        return cls(**known, frame=read_frame(entry.get("frame")))

    @classmethod
    def from_config(cls, name: str, source: str, sha256: str, config: AdapterConfig) -> AdapterInfo:
        """Return the description of an adapter from its configuration."""
        base, rank, alpha = config.base_model_name_or_path, config.r, config.lora_alpha
        return cls(name, source, sha256, base, rank, alpha, config.use_rslora, config.lora_dropout)


@dataclass(frozen=True)
class LoraWeights:
    """The weights of one adapter on one linear layer.

    Attributes:
        A: Tensor of shape (r, in); for the experts of a mixture (experts * r, in), expert by expert.
        B: Tensor of shape (out, r), or (out, experts * r).
        scaling: The factor of the product.
        shift: The vector (out,) that the adapter adds to the output; None if it adds none.
        pending: The parts that depend on the base layer; None for plain LoRA.
        experts: The number of experts; 1 for an ordinary linear layer.
    """

    A: Tensor
    B: Tensor
    scaling: float
    shift: Tensor | None = None
    pending: Pending | None = None
    experts: int = 1


@dataclass(frozen=True)
class Claim:
    """The requirements of one adapter on its base model.

    Attributes:
        name: The adapter's name.
        config: The configuration, which names the target modules; None if the adapter was not read from a folder.
        copies: The base tensors that were saved with the adapter.
        paths: The paths of the modules for which the adapter has weights.
    """

    name: str
    config: AdapterConfig | None
    copies: tuple[BaseCopy, ...]
    paths: frozenset[str]


@dataclass(frozen=True)
class Adapter:
    """One adapter: its description, its weights, and its requirements on the base model.

    Attributes:
        info: The description of the adapter.
        modules: The weights by module path, such as ``model.layers.0.self_attn.q_proj``.
        config: The configuration, which names the target modules; None if the adapter was not read from a folder.
        copies: The base tensors that were saved with the adapter.
    """

    info: AdapterInfo
    modules: dict[str, LoraWeights]
    config: AdapterConfig | None = None
    copies: tuple[BaseCopy, ...] = ()

    def targeted(self) -> frozenset[str]:
        """Return the paths of the modules that ``target_modules`` must name: those with LoRA, except the experts of mixtures."""
        return frozenset(path for path, weights in self.modules.items() if weights.experts == 1 and not (weights.pending and weights.pending.whole))


def read_adapter(name: str, folder: str | Path) -> Adapter:
    """Read a PEFT LoRA folder (``adapter_config.json`` and ``adapter_model.safetensors``) onto the CPU.

    Args:
        name: The name to give to the adapter.
        folder: The PEFT folder, or a folder with a single PEFT sub-folder, as PEFT saves a named adapter.

    Returns:
        The adapter, with tensors in the dtype of the file (float16, bfloat16, float32 or float64).

    Raises:
        AdapterError: The folder is missing or broken, or contains only pickled weights; the adapter cannot be stacked (embeddings, other PEFT methods);
            or the model cannot compute with its weights (integers, NaN, infinity, numbers that overflow).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    location, config, entries = _open(name, Path(folder))
    weights = location / WEIGHTS
    names = read_names(name, entries, config)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as broken:
        raise AdapterError(f"adapter {name!r}: {weights} cannot be read: {broken}", hint=_AGAIN) from broken
    modules = {path: _weights(name, path, {what: tensors[key] for what, key in keys.items()}, config, names.experts) for path, keys in names.lora.items()}
    modules |= {path: _whole(name, path, {what: tensors[key] for what, key in keys.items()}) for path, keys in names.whole.items()}
    on_hub = hub_source(location)
    info = AdapterInfo.from_config(name, str(location) if on_hub is None else on_hub.uri, sha256(weights), config)
    return Adapter(info, modules, config, tuple(names.copies))


def check_adapter(name: str, folder: str | Path) -> None:
    """Check configuration, names, shapes and dtypes as :func:`read_adapter` does, without reading tensors. Raises AdapterError."""
    _, config, entries = _open(name, Path(folder))
    read_names(name, entries, config)


def _open(name: str, folder: Path) -> tuple[Path, AdapterConfig, dict[str, TensorEntry]]:
    """Return the folder that contains the adapter, its configuration, and the header of its weights."""
    try:
        exists = folder.is_dir()
    except (OSError, ValueError) as broken:
        raise AdapterError(f"adapter {name!r}: {str(folder)!r} cannot be read: {broken}", hint="correct the path") from broken
    if not exists:
        raise AdapterError(f"adapter {name!r}: no such folder: {folder}", hint="train it with `meteora train adapters`, or correct the path")
    location = find_adapter(folder) or folder
    config = read_adapter_config(name, location)
    weights = location / WEIGHTS
    if not is_regular(weights):
        pickled = next((file.name for file in sorted(location.iterdir()) if file.suffix in PICKLES), None)
        if pickled:
            raise AdapterError(f"adapter {name!r}: {pickled} is a pickle file, which is never read", hint="save it again as safetensors with a recent PEFT")
        raise AdapterError(f"adapter {name!r}: {location} holds no {WEIGHTS}", hint="copy or train the adapter again")
    try:
        entries, _ = read_header(weights)
    except CheckpointError as broken:
        raise AdapterError(f"adapter {name!r} cannot be read: {broken.message}", hint=broken.hint) from broken
    return location, config, entries


def _weights(name: str, path: str, tensors: Mapping[str, Tensor], config: AdapterConfig, experts: Mapping[str, int]) -> LoraWeights:
    for what, tensor in tensors.items():
        check_tensor(f"adapter {name!r}: {_SAID[what]} of {path}", tensor, error=AdapterError)
    A, B, count = tensors["A"], tensors["B"], experts.get(path, 1)
    rank, alpha = A.shape[0] // count, config.alpha_of(path)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    refuse_peak(f"adapter {name!r}: the scaling of {path}", abs(scaling), torch.float32, AdapterError)
    if path in experts:  # PEFT's columns of B go through the experts for every rank
        B = B.reshape(-1, rank, count).transpose(1, 2).reshape(-1, count * rank)
    shift = tensors["shift"] * scaling if "shift" in tensors else None
    pending = Pending(tensors.get("magnitude"), tensors.get("bias")) if tensors.keys() & {"magnitude", "bias"} else None
    return LoraWeights(A, B, scaling, shift, pending, count)


def _whole(name: str, path: str, tensors: Mapping[str, Tensor]) -> LoraWeights:
    """Return a linear layer that was trained as a whole as an adapter of full rank, whose A is the identity."""
    for what, tensor in tensors.items():
        check_tensor(f"adapter {name!r}: {what} of {path}", tensor, error=AdapterError)
    weight = tensors["weight"]
    return LoraWeights(torch.eye(weight.shape[1], dtype=weight.dtype), weight, 1.0, pending=Pending(bias=tensors.get("bias"), whole=True))
