"""The contents of a native checkpoint: the configuration and tensors of a model with adapters, and their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.base_route import real_adapters
from meteora_core.adapters.config import WRAPPERS
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, WEIGHT_FILE, weight_metadata
from meteora_core.checkpoints.stacks import TABLES, stack_entry, with_features
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.fetch.catalog import CATALOG
from meteora_core.fetch.hub_names import SCHEME
from meteora_core.json_files import read_json, write_json
from meteora_core.model.attach import gate_origin, meteora_layers
from meteora_core.model.base import BaseReference, loaded_by
from meteora_core.model.offload import real_tensor
from meteora_core.model.sharded import full_tensor, is_spread
from meteora_core.routing import base_record, meteora_of
from meteora_core.routing.base_marks import mark
from meteora_core.tensor_files import TensorPlan, dtype_name, tensor_bytes, write_tensors
from meteora_core.text import listed

_log = logging.getLogger(__name__)


def note_base_changes(model: nn.Module, names: Iterable[str], rounded: Mapping[str, torch.dtype] | None = None) -> None:
    """Record which tensors of a model's base were changed, so that :func:`meteora_core.save_checkpoint` stores them.

    The names are those in the base model (``model.norm.weight``, without ``base_layer``).

    Args:
        model: The model whose base was changed.
        names: The names of the changed tensors, which checkpoints store.
        rounded: The dtypes of tensors that were only rounded, by their names; checkpoints record the rounding without the tensors.
    """
    record = base_record(model)
    record.changed, record.rounded = tuple(sorted(names)), dict(sorted((rounded or {}).items()))


def rounding_table(rounded: Mapping[str, torch.dtype]) -> dict[str, list[str]]:
    """Return the entry of a configuration for rounded base tensors: their names by dtype."""
    table: dict[str, list[str]] = {}
    for name, dtype in sorted(rounded.items()):
        table.setdefault(str(dtype).removeprefix("torch."), []).append(name)
    return table


def base_changes(model: nn.Module) -> tuple[str, ...]:
    """Return the names that :func:`note_base_changes` recorded."""
    return base_record(model).changed


def is_changed(model: nn.Module) -> bool:
    """Whether any tensor of the base was changed or rounded."""
    record = base_record(model)
    return bool(record.changed or record.rounded)


def base_name(name: str) -> str:
    """Return the name in the base model of a parameter of the model with adapters."""
    return name.replace(".base_layer.", ".")


def _base_names(model: nn.Module) -> list[str]:
    """Return the names, in the model with adapters, of all parameters and buffers of its base."""
    own = {f"{path}.{name}" for path, _ in meteora_layers(model) for name in ("gate", "lora_A", "lora_B", "scaling", "offsets", "pair_offsets", *TABLES)}
    named = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    return [name for name in named if name not in own]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of the base of a model with adapters, by their names in the base model."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {base_name(name): named[name] for name in _base_names(model)}


HOW_TO_LOAD = "load this folder with meteora_core.load_checkpoint(folder)"
MODEL_TYPE = f"meteora: {HOW_TO_LOAD}"
"""The ``model_type`` in a checkpoint's ``config.json``; transformers shows it in an error if ``meteora_core`` is not imported."""
TRANSFORMERS_CONFIG = "config.json"
TRANSFORMERS_WEIGHTS = "model.safetensors"
_WRAPPERS = WRAPPERS | {"module"}
"""Parts that wrappers of a model insert into the names of its state dict."""


def is_ours(folder: Path) -> bool:
    """Whether the ``config.json`` in a folder is that of a native checkpoint."""
    try:
        config = read_json(folder / TRANSFORMERS_CONFIG, error=CheckpointError)
    except CheckpointError:
        return False
    return isinstance(config, dict) and str(config.get("model_type")).partition(":")[0] == "meteora"


def whole_tensor(model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return a parameter or buffer with its values, from a gathered state dict, from accelerate's offload, or gathered from shards.

    Args:
        model: A model with adapters attached.
        name: The name in ``model.named_parameters()`` or ``model.named_buffers()``.
        state_dict: The gathered state dict of the whole model. None means the tensors of the model; if they are sharded, every process must call this.

    Raises:
        UsageError: The state dict does not have the tensor, or the parameter has no values.
    """
    if state_dict is not None:
        if name in state_dict:
            return state_dict[name].detach()
        clean = {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in state_dict}
        if name not in clean:
            raise UsageError(
                f"the state dict to be saved lacks {name}", hint="pass the state dict of the whole model, such as accelerator.get_state_dict(model)"
            )
        return state_dict[clean[name]].detach()
    path, _, last = name.rpartition(".")
    tensor = real_tensor(model.get_submodule(path), last, path)
    return full_tensor(tensor) if is_spread(tensor) else tensor.detach()


def _changed_base(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Return the tensors of the base that a checkpoint must store: those recorded as changed, and those that train.

    The keys are their names in the base model, the values their names in the model with adapters.

    Raises:
        UsageError: Other tensors, or the shape of a tensor, have changed since the adapters were attached.
    """
    names = {base_name(name): name for name in _base_names(model)}
    training = {base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name: names[name] for name in sorted({*base_changes(model), *training}) if name in names}
    before, now = meteora_of(model).provenance.base_marks, _present(model, names, state_dict)
    if before is None:
        return changed
    differ = before.changed(mark(now))
    if resized := [name for name in differ if before.shapes[name] != now[name].shape]:
        was, shape = list(before.shapes[resized[0]]), list(now[resized[0]].shape)
        raise UsageError(
            f"{resized[0]} of the base model had the shape {was} when the adapters were attached, and now has {shape}; a checkpoint cannot change that",
            hint="resize the base model first, save it with its save_pretrained, load it again, and attach the adapters to the loaded model",
        )
    if lost := [name for name in differ if name not in changed and name not in base_record(model).rounded]:
        raise UsageError(
            f"weights of the base model have changed since the adapters were attached, and a checkpoint does not hold them: {listed(lost)}",
            hint="pass the names of the changed tensors to meteora_core.checkpoints.native.note_base_changes(model, names) to save them too",
        )
    return changed


def _present(model: nn.Module, names: Mapping[str, str], state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the present tensors of the base by their names in the base model, from the model or from a gathered state dict."""
    if state_dict is None:
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    else:
        own = {".".join(part for part in key.split(".") if part not in _WRAPPERS): tensor for key, tensor in state_dict.items()}
    return {name: own[inside] for name, inside in names.items() if inside in own}


@dataclass(frozen=True)
class SaveOptions:
    """The arguments of :func:`meteora_core.save_checkpoint` that determine the content of a checkpoint.

    Attributes:
        base: The name of the base model; None means the name that it was loaded by, else ``model.name_or_path``.
        adapters: Whether to store the weights of the adapters.
        dtype: The dtype of the stored tensors; None keeps the dtype of each tensor.
        training: A record of the training.
    """

    base: BaseReference | None = None
    adapters: bool = False
    dtype: torch.dtype | None = None
    training: dict[str, Any] | None = None


def checkpoint_parts(
    model: nn.Module, folder: str | Path, options: SaveOptions, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a checkpoint for a model with adapters.

    The tensors include the parameters of the base that train (``requires_grad``).

    Args:
        model: A model with adapters attached.
        folder: The folder that the checkpoint will be saved to, for a log message.
        options: The content of the checkpoint.
        state_dict: The gathered state dict of the whole model, for a sharded model; see :func:`whole_tensor`.

    Raises:
        UsageError: The model has no adapters, the base was changed since they were attached, or the state dict lacks tensors.
    """
    state = meteora_of(model)
    known = state.provenance
    layers = dict(meteora_layers(model))
    adapters = options.adapters or known.embedded or not all(adapter.sha256 for adapter in real_adapters(state.adapters))
    adapters = adapters or (is_changed(model) and not all(layer.is_plain for layer in layers.values()))  # DoRA's factors depend on the base
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for path, layer in layers.items():
        for name in ("gate", "lora_A", "lora_B") if adapters else ("gate",):
            tensor = whole_tensor(model, f"{path}.{name}", state_dict)
            tensors[f"{path}.{name}"] = tensor.to("cpu", options.dtype or tensor.dtype).contiguous()
        for name in TABLES if adapters else ():
            if (values := getattr(layer, name)) is not None:
                tensors[f"{path}.{name}"] = values.detach().cpu().contiguous()
        modules[path] = stack_entry(layer.stack)
    origin = gate_origin(model, {path: tensors[f"{path}.gate"] for path in modules})
    if origin == "untrained":
        _log.warning("the gates saved in %s are untrained: they still have the initial values from attach", folder)
    changed = _changed_base(model, state_dict)
    for name, inside in changed.items():
        tensor = whole_tensor(model, inside, state_dict)
        tensors[BASE + name] = tensor.to("cpu", options.dtype or tensor.dtype, copy=True).contiguous()
    reference = _reference(model, options.base)
    config = {
        "base": {"name": reference.name, "revision": reference.revision, "probe": known.base_probe},
        "top_k": state.top_k,
        "temperature": state.temperature,
        "adapters": [replace(adapter, source=_source(adapter.source, Path(folder))).to_json() for adapter in state.adapters],
        "gates": origin,
        **({"gates_start": {"init": known.start.init, "seed": known.start.seed}} if origin == "untrained" and known.start else {}),
        "contains": ["gates", *(["adapters"] if adapters else []), *(["base"] if changed else [])],
        "base_tensors": list(changed),
        "base_rounded": rounding_table(base_record(model).rounded),
        "modules": modules,
        "frame": known.frame.to_json() if known.frame else None,
        **({"renamed": known.renamed} if known.renamed else {}),
        "training": options.training or {},
    }
    return with_features(config), tensors


def _reference(model: nn.Module, base: BaseReference | None) -> BaseReference:
    """The base model to record: a model on the hub with the commit that it was loaded at, and a folder by its absolute path."""
    loaded = loaded_by(model)
    reference = base or loaded or BaseReference(str(getattr(model, "name_or_path", "") or "unknown"))
    if reference.name not in CATALOG and Path(reference.name).is_dir():
        return replace(reference, name=str(Path(reference.name).absolute()))
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    if commit and reference.name in (getattr(model, "name_or_path", None), loaded.name if loaded else None):
        return replace(reference, revision=str(commit))
    return reference


def _source(source: str, folder: Path) -> str:
    """The folder of an adapter, relative to the checkpoint if it was relative to the working directory."""
    if not source or source.startswith(SCHEME) or Path(source).is_absolute() or not Path(source).is_dir():
        return source
    return os.path.relpath(source, folder)


def write_files(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the files of a checkpoint into an existing folder, with the hash of the weights in the configuration. Raises StorageError."""
    plans = [TensorPlan(name, dtype_name(tensor.dtype), tuple(tensor.shape), partial(_bytes_of, tensor)) for name, tensor in tensors.items()]
    digest = write_tensors(folder / WEIGHT_FILE, plans, weight_metadata(config))
    write_json(folder / CONFIG_FILE, {**config, "weights_sha256": digest})
    # The vocabulary size is a text, so that loading with the class of the base model fails with this text instead of creating random weights.
    write_json(folder / TRANSFORMERS_CONFIG, {"model_type": MODEL_TYPE, "vocab_size": HOW_TO_LOAD})


def _bytes_of(tensor: Tensor) -> list[bytes]:
    return [tensor_bytes(tensor)]
