"""Reads and checks a PEFT LoRA folder, and refuses adapters that cannot be stacked.

Banks, the evaluation of single adapters, chat and Arrow all read adapters through :func:`read_adapter`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.config import CONFIG, PLAIN, WEIGHTS, WRAPPERS, AdapterConfig, find_adapter, read_adapter_config
from meteora_core.adapters.magnitudes import WEIGHT_NAMES, check_tensor, refuse_peak
from meteora_core.data.frames import Frame, read_frame
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.files import sha256
from meteora_core.reading import is_regular
from meteora_core.tensor_files import PICKLES, TensorEntry, read_header

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "AdapterInfo", "BaseCopy", "LoraWeights", "check_adapter", "find_adapter", "read_adapter"]

_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_COPY = re.compile(r"^(?P<path>(?:.+\.)?(?:lm_head|embed_out|output_layer))\.base_layer\.weight$")
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class AdapterInfo:
    """The description of one adapter, which checkpoints record so that a loaded model equals the trained one.

    Attributes:
        name: The adapter's name in the bank, usually the name of its task.
        source: The folder that the adapter was read from.
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
    """The weights of one adapter on one linear layer: ``A`` (r, in), ``B`` (out, r), and the scaling."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class BaseCopy:
    """A tensor of the base model that PEFT saved with the adapter, as it does for an adapted ``lm_head``; it must equal the base model's.

    Attributes:
        path: The path of the module in the base model.
        entry: The file, dtype and shape of the copy.
        key: The name of the copy in the file.
    """

    path: str
    entry: TensorEntry
    key: str


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


def read_adapter(name: str, folder: str | Path) -> Adapter:
    """Read a PEFT LoRA folder (``adapter_config.json`` and ``adapter_model.safetensors``) onto the CPU.

    Args:
        name: The name to give to the adapter.
        folder: The PEFT folder, or a folder with a single PEFT sub-folder, as PEFT saves a named adapter.

    Returns:
        The adapter, with tensors in the dtype of the file (float16, bfloat16, float32 or float64).

    Raises:
        AdapterError: The folder is missing or broken, or contains only pickled weights; the adapter cannot be stacked (DoRA, bias, modules_to_save,
            embeddings, other PEFT methods); or the model cannot compute with its weights (integers, NaN, infinity, numbers that overflow).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    location, config, entries = _open(name, Path(folder))
    weights = location / WEIGHTS
    paths, copies = _paths(name, entries, config)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as broken:
        raise AdapterError(f"adapter {name!r}: {weights} cannot be read: {broken}", hint=_AGAIN) from broken
    modules = {path: _weights(name, path, tensors[sides["A"]], tensors[sides["B"]], config) for path, sides in paths.items()}
    info = AdapterInfo.from_config(name, str(location), sha256(weights), config)
    return Adapter(info, modules, config, copies)


def check_adapter(name: str, folder: str | Path) -> None:
    """Check configuration, names, shapes and dtypes as :func:`read_adapter` does, without reading tensors. Raises AdapterError."""
    _, config, entries = _open(name, Path(folder))
    _paths(name, entries, config)


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


def module_path(key: str) -> str:
    """Return a tensor's name without the prefixes and parts that wrappers (PEFT, ``torch.compile``, FSDP, DDP) insert, even repeatedly."""
    key = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while True:
        bare = key.removeprefix("module.").removeprefix(_PREFIX)
        if bare == key:
            return key
        key = bare


def _paths(name: str, entries: dict[str, TensorEntry], config: AdapterConfig) -> tuple[dict[str, dict[str, str]], tuple[BaseCopy, ...]]:
    """Return the keys of A and B by module path, and the copies of base tensors. Raises AdapterError for any other tensor."""
    sides: dict[str, dict[str, str]] = {}
    copies, adapters = [], Counter[str]()
    for key, entry in entries.items():
        bare = module_path(key)
        if copied := _COPY.match(bare):
            copies.append(BaseCopy(copied["path"], entry, key))
            continue
        match = _KEY.match(bare)
        if match is None:
            raise AdapterError(f"adapter {name!r}: {key} is {_what(bare)}; it cannot be stacked", hint=_without(bare))
        if entry.dtype not in WEIGHT_NAMES:
            raise AdapterError(f"adapter {name!r}: {key} has dtype {entry.dtype}; weights are F16, BF16, F32 or F64", hint="save it in a floating dtype")
        if len(entry.shape) != 2:
            raise AdapterError(f"adapter {name!r}: {key} has shape {entry.shape}; only adapters of linear layers can be stacked", hint=PLAIN)
        pair = sides.setdefault(match["path"], {})
        if match["side"] in pair:
            raise AdapterError(
                f"adapter {name!r} holds two tensors for lora_{match['side']} of {match['path']}: {pair[match['side']]} and {key}",
                hint="save one adapter per folder",
            )
        pair[match["side"]] = key
        adapters[match["adapter"] or ""] += 1
    if not sides:
        raise AdapterError(f"adapter {name!r} holds no weights", hint="copy or train the adapter again")
    if len(adapters) > 1:
        raise AdapterError(f"adapter {name!r} holds several adapters: {', '.join(sorted(adapters))}", hint="save one adapter per folder")
    for path, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"adapter {name!r}: {path} has lora_{next(iter(pair))} but not the other matrix", hint=_AGAIN)
        first, second = entries[pair["A"]].shape, entries[pair["B"]].shape
        rank, wanted = first[0], config.rank_of(path)
        if second[1] != rank or 0 in (*first, *second):
            raise AdapterError(f"adapter {name!r}: {path} has A {first} and B {second}, whose ranks differ or are 0", hint=_AGAIN)
        if rank != wanted:
            raise AdapterError(f"adapter {name!r}: {path} has rank {rank}, and {CONFIG} says {wanted}", hint="correct r or rank_pattern there")
    for copy in copies:
        if copy.path not in sides:
            raise AdapterError(f"adapter {name!r}: {copy.key} belongs to no adapted module; it cannot be stacked", hint=_without(copy.key))
    return dict(sides), tuple(copies)


def _what(key: str) -> str:
    if "lora_embedding" in key:
        return "an embedding adapter"
    if re.search(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)\.(?:base_layer\.)?weight$", key):
        return "a tensor of the base model (PEFT saves embeddings that were resized or trained)"
    return "not a LoRA weight"


def _without(key: str) -> str:
    if "embed" in key or "lm_head" in key or "wte" in key:
        return "train on linear layers of an unchanged base model, and save with save_embedding_layers=False"
    return "only plain LoRA on linear layers can be stacked"


def _weights(name: str, path: str, A: Tensor, B: Tensor, config: AdapterConfig) -> LoraWeights:
    for side, tensor in (("lora_A", A), ("lora_B", B)):
        check_tensor(f"adapter {name!r}: {side} of {path}", tensor, error=AdapterError)
    rank, alpha = A.shape[0], config.alpha_of(path)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    refuse_peak(f"adapter {name!r}: the scaling of {path}", abs(scaling), torch.float32, AdapterError)
    return LoraWeights(A, B, scaling)
