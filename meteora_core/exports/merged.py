"""Merges one adapter of a checkpoint into the base model, and saves it as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.checkpoints.native import load_checkpoint, read_config
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.model.attach import detach, meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import meteora_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_merged(checkpoint: str | Path, folder: str | Path, name: str, options: ExportOptions = ExportOptions(), dtype: str = "float32") -> Exported:
    """Merge one adapter of a checkpoint into the base model, and save the model and its tokenizer with transformers.

    The weights are merged in float32 and rounded to ``dtype`` once. Gates and the other adapters are left out.

    Args:
        checkpoint: A native checkpoint.
        folder: The folder to write.
        name: The name of the adapter in the checkpoint.
        options: The options of the export.
        dtype: The dtype of the saved weights: "float32", "bfloat16" or "float16".

    Raises:
        UsageError: There is no such adapter, the dtype is unknown, or the folder exists.
        CheckpointError: The checkpoint is broken or does not fit its base model.
        StorageError: The folder cannot be written.

    Example:
        >>> from meteora_core.exports.merged import export_merged
        >>> export_merged("runs/mine", "gsm8k-merged", "gsm8k").kind  # doctest: +SKIP
        'merged'
    """
    folder = Path(folder)
    check_export(checkpoint, folder, overwrite=options.overwrite)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"unknown dtype {dtype!r}", hint="choose from: float32, bfloat16, float16")
    config = read_config(checkpoint)
    reference = BaseReference(options.base) if options.base else BaseReference(config["base"]["name"], config["base"].get("revision"))
    tokenizer = load_tokenizer(reference, progress=options.progress)
    model = load_checkpoint(
        checkpoint, reference, torch.float32, "cpu", backend="dense", adapters_dir=options.adapters_dir, allow_untrained=True, progress=options.progress
    )
    merge_adapter(model, name)
    model.to(getattr(torch, dtype))
    with atomic_folder(folder) as temporary, storage_errors(folder):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Exported.of_folder(folder, "merged", name)


def merge_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Merge one of the attached adapters into the base model, in place, and detach the others.

    An output layer that shares its weight with the embedding gets a weight of its own if the adapter changes it.

    Args:
        model: A model with adapters attached.
        name: The name of the adapter.

    Returns:
        The same model, without adapters.

    Raises:
        UsageError: There is no such adapter, or the base model is quantised, so that its weights cannot be changed.
    """
    names = meteora_of(model).names
    if name not in names:
        raise UsageError(f"no adapter named {name!r} in the model", hint=did_you_mean(name, names) or f"its adapters are: {', '.join(names)}")
    index = names.index(name)
    changed = [layer for _, layer in meteora_layers(model) if layer.ranks[index]]
    for layer in changed:
        if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize < 2:
            raise UsageError(f"{layer.path} of the base model is quantised, so that no adapter can be merged into it", hint="load the base model unquantised")
    with torch.no_grad():
        weights = {layer.path: merged_weight(layer, index) for layer in changed}
    detach(model)
    for path, weight in weights.items():
        _set_weight(model, path, weight)
    return model


def merged_weight(layer: MeteoraLinear, index: int) -> Tensor:
    """Return the weight of a layer with one adapter merged, ``W + s B A``, in the dtype of the base layer (computed in float32 or wider)."""
    own = layer.weight
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    start = sum(layer.ranks[:index])
    rows = slice(start, start + layer.ranks[index])
    delta = (layer.lora_B[rows].to(wide).t() @ layer.lora_A[rows].to(wide)) * float(layer.scaling[index])
    return (own.to(wide) + delta).to(own.dtype)


def _set_weight(model: PreTrainedModel, path: str, weight: Tensor) -> None:
    module = model.get_submodule(path)
    embedding = model.get_input_embeddings()
    if module.weight is getattr(embedding, "weight", None):
        module.weight = nn.Parameter(weight, requires_grad=False)
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    else:
        with torch.no_grad():
            module.weight.copy_(weight)
