"""Reads the tensors, the number of adapters and their rank from the headers of a checkpoint in the authors' layout.

The layout is a ``model.safetensors`` (or shards). For every adapted linear layer, it contains the following tensors with the prefix ``base_model.model.``:
``{path}.base_layer.weight`` (out, in), ``{path}.moe_gate.weight`` (N, in), ``{path}.lora_A.weight`` (N r, in) and ``{path}.lora_B.weight`` (out, N r).
Adapter ``i`` has the rows of A and the columns of B from ``r i`` to ``r (i + 1)``. Norms, embeddings and lm_head have the same prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from meteora_core.adapters.bank import natural_order
from meteora_core.adapters.config import find_adapter, read_adapter_config
from meteora_core.adapters.magnitudes import WEIGHT_NAMES, check_stack, check_tensor
from meteora_core.adapters.peft_folder import WEIGHTS, AdapterInfo
from meteora_core.adapters.stack import Stack
from meteora_core.data.tasks import TASK_ORDER
from meteora_core.errors import AdapterError, CheckpointError, UsageError
from meteora_core.reading import is_regular
from meteora_core.tensor_files import TensorEntry, TensorFiles, read_header
from meteora_core.text import listed

PREFIX = "base_model.model."
DEFAULT_ALPHA = 16.0
"""The ``lora_alpha`` of the adapters that the authors published, whose rank is 8."""

_PARTS = ("moe_gate", "lora_A", "lora_B")
_ADAPTED = re.compile(r"^(?P<path>.+)\.(?P<part>base_layer|moe_gate|lora_A|lora_B)\.(?P<kind>weight|bias)$")
_COMPUTED = ".rotary_emb.inv_freq"
_AGAIN = "copy or download the checkpoint again"


@dataclass(frozen=True)
class AuthorsLayout:
    """The contents of a checkpoint in the authors' layout, according to its headers.

    Attributes:
        tensors: The tensors in the files.
        count: The number N of adapters.
        rank: The rank r of every adapter.
        modules: The number of input and output features of each adapted linear layer, by its path in the model, in the order of an AdapterBank.
        base: The key in the files of each base tensor, by its name in the model; empty if the checkpoint has no base tensors.
    """

    tensors: TensorFiles
    count: int
    rank: int
    modules: dict[str, tuple[int, int]]
    base: dict[str, str]

    def entry(self, path: str, part: str) -> TensorEntry:
        """Return the entry of ``moe_gate``, ``lora_A`` or ``lora_B`` of one linear layer."""
        return self.tensors.entries[key_of(path, part)]

    def stack(self, path: str, scaling: torch.Tensor, names: Sequence[str]) -> Stack:
        """Read and check the adapters of one linear layer.

        Args:
            path: The path of the layer in the model.
            scaling: float32 tensor of shape (N,): the scaling of each adapter.
            names: The names of the adapters, in order.

        Raises:
            CheckpointError: A number is NaN, infinite, or so large that products overflow.
        """
        A, B = self.tensors.read(key_of(path, "lora_A")), self.tensors.read(key_of(path, "lora_B"))
        stack = Stack(A, B.t().contiguous(), (self.rank,) * self.count, scaling)
        check_stack(path, stack, names, A.dtype, CheckpointError)
        return stack

    def gate(self, path: str) -> torch.Tensor:
        """Return the gate of one linear layer, of shape (N, in). Raises CheckpointError for NaN, infinity and numbers that overflow."""
        gate = self.tensors.read(key_of(path, "moe_gate"))
        check_tensor(key_of(path, "moe_gate"), gate)
        return gate


def key_of(path: str, part: str) -> str:
    """Return the key of ``base_layer``, ``moe_gate``, ``lora_A`` or ``lora_B`` of a linear layer."""
    return f"{PREFIX}{path}.{part}.weight"


def is_authors(names: Sequence[str]) -> bool:
    """Whether the names of tensors are those of the authors' layout."""
    return any(name.startswith(PREFIX) and name.endswith(".moe_gate.weight") for name in names)


def read_layout(checkpoint: str | Path) -> AuthorsLayout:
    """Read the headers of a checkpoint in the authors' layout.

    Args:
        checkpoint: A safetensors file, an index of shards, or a folder that contains one of them.

    Raises:
        CheckpointError: The checkpoint is unreadable or in another layout, tensors are missing or unknown (the message names the first five), or
            shapes do not fit each other.
    """
    tensors = TensorFiles(checkpoint)
    if not is_authors(list(tensors.entries)):
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint in the authors' layout: it has no {PREFIX}….moe_gate.weight",
            hint=f"it holds {listed(tensors.entries)}; `meteora ckpt inspect` says what it is",
        )
    parts: dict[str, set[str]] = {}
    base: dict[str, str] = {}
    unknown = []
    for key in tensors.entries:
        name = key.removeprefix(PREFIX)
        match = _ADAPTED.match(name)
        if name == key or (match is not None and match["kind"] == "bias" and match["part"] != "base_layer"):
            unknown.append(key)
        elif match is None:
            if not name.endswith(_COMPUTED):
                base[name] = key
        else:
            if match["kind"] == "weight":
                parts.setdefault(match["path"], set()).add(match["part"])
            if match["part"] == "base_layer":
                base[f"{match['path']}.{match['kind']}"] = key
    if unknown:
        raise CheckpointError(f"{checkpoint} has unknown tensors: {listed(sorted(unknown))}", hint=f"every key of the authors' layout starts with {PREFIX}")
    wanted = (*_PARTS, "base_layer") if base else _PARTS
    missing = [key_of(path, part) for path in sorted(_grid(list(parts)), key=natural_order) for part in wanted if part not in parts.get(path, ())]
    if missing:
        raise CheckpointError(f"{checkpoint} lacks tensors: {listed(missing)}", hint=_AGAIN)
    return _measure(checkpoint, tensors, sorted(parts, key=natural_order), base)


def _grid(paths: list[str]) -> set[str]:
    """Return the expected paths: each kind of adapted linear layer in every block with adapted layers."""
    kinds: dict[str, set[str]] = {}
    blocks: dict[str, set[str]] = {}
    for path in paths:
        match = re.match(r"^(.*?\.)(\d+)(\..+)$", path)
        stem, block, tail = match.groups() if match else ("", "", path)
        kinds.setdefault(stem, set()).add(tail)
        blocks.setdefault(stem, set()).add(block)
    return {f"{stem}{block}{tail}" for stem in kinds for block in blocks[stem] for tail in kinds[stem]}


def _measure(checkpoint: str | Path, tensors: TensorFiles, paths: list[str], base: dict[str, str]) -> AuthorsLayout:
    def shape(path: str, part: str) -> tuple[int, int]:
        dimensions = tensors.entries[key_of(path, part)].shape
        if len(dimensions) != 2:
            raise CheckpointError(f"{checkpoint}: {key_of(path, part)} has shape {list(dimensions)}, expected two dimensions")
        return dimensions[0], dimensions[1]

    count, total = shape(paths[0], "moe_gate")[0], shape(paths[0], "lora_A")[0]
    if count == 0 or total == 0 or total % count:
        raise CheckpointError(f"{checkpoint}: the {total} rows of lora_A are not a multiple of the {count} adapters of the gates")
    modules = {}
    for path in paths:
        width, out = shape(path, "moe_gate")[1], shape(path, "lora_B")[0]
        expected = {"moe_gate": (count, width), "lora_A": (total, width), "lora_B": (out, total)}
        if f"{path}.weight" in base:
            expected["base_layer"] = (out, width)
        for part, wanted in expected.items():
            dtype = tensors.entries[key_of(path, part)].dtype
            if dtype not in WEIGHT_NAMES:
                raise CheckpointError(f"{checkpoint}: {key_of(path, part)} has dtype {dtype}; weights are F16, BF16, F32 or F64", hint=_AGAIN)
            if shape(path, part) != wanted:
                raise CheckpointError(f"{checkpoint}: {key_of(path, part)} has shape {list(shape(path, part))}, expected {list(wanted)}", hint=_AGAIN)
        modules[path] = (width, out)
    return AuthorsLayout(tensors, count, total // count, modules, base)


@dataclass(frozen=True)
class AuthorsAdapters:
    """Information about the adapters of a checkpoint in the authors' layout, which stores only their weights.

    Attributes:
        folder: The folder with one PEFT folder per adapter, which gives names, ranks and alphas; None if there is none.
        names: The names of the adapters in the order of the checkpoint. None means the 28 tasks for 28 adapters, else the sorted names of the folders,
            else numbers.
        alpha: The ``lora_alpha`` of all adapters, only without ``folder``; None means 16, as in the authors' training.

    Raises:
        UsageError: Both ``alpha`` and ``folder`` are given.

    Example:
        >>> AuthorsAdapters(alpha=8).alpha
        8
    """

    folder: str | Path | None = None
    names: Sequence[str] | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and self.alpha is not None:
            raise UsageError("alpha and the folder of adapters, which states alpha, exclude each other", hint="leave out one of them")

    @classmethod
    def of(cls, adapters: AuthorsAdapters | str | Path | None) -> AuthorsAdapters:
        """Return ``adapters`` itself, or the value for a folder."""
        return adapters if isinstance(adapters, AuthorsAdapters) else cls(adapters)


def describe_adapters(layout: AuthorsLayout, adapters: AuthorsAdapters) -> tuple[AdapterInfo, ...]:
    """Return the name, rank and alpha of each adapter, in the order of the checkpoint.

    Args:
        layout: The contents of the checkpoint.
        adapters: Information about its adapters.

    Returns:
        The N descriptions. Their hashes are empty, because the weights come from the checkpoint and not from the folders.

    Raises:
        CheckpointError: The names or their number do not fit the checkpoint, a rank differs, or the checkpoint has the weights of the folders in
            another order.
        AdapterError: A configuration is missing or broken, or describes another kind of adapter.
    """
    source, names = str(layout.tensors.path), adapters.names
    if adapters.folder is None:
        order = tuple(names or (TASK_ORDER if layout.count == len(TASK_ORDER) else (f"adapter_{i}" for i in range(layout.count))))
        _check_names(layout, order)
        scale = DEFAULT_ALPHA if adapters.alpha is None else adapters.alpha
        return tuple(AdapterInfo(name, source, "", None, layout.rank, scale, False, 0.0) for name in order)
    folder = Path(adapters.folder)
    if not folder.is_dir():
        raise CheckpointError(f"no such folder of adapters: {folder}", hint="pass the folder that holds one folder per task, such as llama3_8b_peft")
    adapter_folders = {
        path.name: adapter_folder for path in folder.iterdir() if not path.name.startswith(".") and (adapter_folder := find_adapter(path)) is not None
    }
    present = sorted(adapter_folders)
    order = tuple(names) if names is not None else TASK_ORDER if layout.count == len(TASK_ORDER) else tuple(present)
    absent, extra = [name for name in order if name not in present], [name for name in present if name not in order]
    if absent or (extra and names is None):
        parts = ([f"lacks {listed(absent)}"] if absent else []) + ([f"has also {listed(extra)}"] if extra else [])
        raise CheckpointError(
            f"the checkpoint {source} has {layout.count} adapters, and {folder} has {len(present)}: it {' and '.join(parts)}",
            hint="pass the folder that the checkpoint was trained with, or the adapters' names in their order",
        )
    _check_names(layout, order)
    infos = tuple(_info(name, adapter_folders[name], layout, source) for name in order)
    _check_order(layout, adapter_folders, order)
    return infos


def scaling_of(info: AdapterInfo) -> float:
    """Return the scaling of an adapter: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return info.alpha / (float(info.rank) ** 0.5 if info.rslora else info.rank)


def _check_names(layout: AuthorsLayout, order: Sequence[str]) -> None:
    twice = sorted({name for name in order if list(order).count(name) > 1})
    if twice or len(order) != layout.count:
        what = f"names given twice: {listed(twice)}" if twice else f"{len(order)} names: {listed(order)}"
        raise CheckpointError(f"the checkpoint {layout.tensors.path} has {layout.count} adapters, and there are {what}", hint="give one name per adapter")


def _info(name: str, folder: Path, layout: AuthorsLayout, source: str) -> AdapterInfo:
    config = read_adapter_config(name, folder)
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if patterns:
            raise AdapterError(f"adapter {name!r} uses {key}, which the authors' layout cannot hold", hint="its adapters have one rank and one alpha")
    if config.more:
        raise AdapterError(f"adapter {name!r} uses {config.more}, which the authors' layout cannot hold", hint="its adapters are plain LoRA")
    if config.r != layout.rank:
        raise CheckpointError(f"adapter {name!r} has rank {config.r}, and the adapters in {source} have rank {layout.rank}", hint="these are other adapters")
    return AdapterInfo.from_config(name, source, "", config)


def _check_order(layout: AuthorsLayout, places: Mapping[str, Path], order: Sequence[str]) -> None:
    """Refuse an order that contradicts the checkpoint, which has exactly the weights of one adapter at the index of another.

    Adapters that were trained together with the gates match no folder, so their order cannot be checked.
    """
    path = next(iter(layout.modules))
    slots = layout.tensors.read(key_of(path, "lora_A")).float().reshape(layout.count, layout.rank, -1)
    dtype = layout.entry(path, "lora_A").torch_dtype
    folder_weights = {}
    for name in order:
        file = places[name] / WEIGHTS
        if not is_regular(file):
            continue
        entries, _ = read_header(file)
        key = next((key for key in entries if key.startswith(f"{PREFIX}{path}.lora_A.")), None)
        if key is None:
            continue
        weights = TensorFiles(file).read(key)
        if weights.shape != slots.shape[1:]:
            raise CheckpointError(
                f"adapter {name!r} has {key} of shape {list(weights.shape)}, the checkpoint {list(slots.shape[1:])}",
                hint="these adapters were trained on another base model",
            )
        folder_weights[name] = weights.to(dtype).float()
    for slot, name in enumerate(order):
        if name not in folder_weights or torch.equal(slots[slot], folder_weights[name]):
            continue
        other = next((other for other, weights in folder_weights.items() if torch.equal(slots[slot], weights)), None)
        if other is not None:
            raise CheckpointError(
                f"the order of the adapters is not that of the checkpoint: adapter {slot} of {layout.tensors.path} is {other!r}, not {name!r}",
                hint="give the adapters' names in the order of the checkpoint",
            )
