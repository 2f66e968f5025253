"""Merges one adapter of a checkpoint into the base model, and saves it as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native import load_checkpoint, read_config
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.model.attach import detach, meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.model.experts import ExpertsLinear
from meteora_core.model.layer import MeteoraLinear
from meteora_core.model.linears import bias_of, is_conv1d, plain_weight
from meteora_core.routing import meteora_of
from meteora_core.tensors import is_quantized

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
    checkpoint = checkpoint_folder(checkpoint, progress=options.progress)
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
        if is_quantized(layer.weight):
            raise UsageError(f"{layer.path} of the base model is quantised, so that no adapter can be merged into it", hint="load the base model unquantised")
    layers = {layer.path: (merged_weight(layer, index), _merged_bias(layer, index)) for layer in changed}
    experts = {layer.path for layer in changed if isinstance(layer, ExpertsLinear)}
    detach(model)
    for path, (weight, bias) in layers.items():
        _set_weight(model, path, weight, bias, of_experts=path in experts)
    return model


@torch.no_grad()
def merged_weight(layer: MeteoraLinear, index: int) -> Tensor:
    """Return the weight of a layer with one adapter merged, such as ``W + s B A``, in the layout and dtype of the base layer.

    It is computed in float32 or wider. DoRA's factor multiplies the rows of W, and is part of B already.
    """
    stack, own = layer.stack, layer.weight
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    rows, scaling = stack.rows(index), float(stack.scaling[index])
    A, B = stack.A[rows].to(wide), stack.B[rows].to(wide)
    if isinstance(layer, ExpertsLinear):
        first, second = A.reshape(stack.experts, -1, A.shape[1]), B.reshape(stack.experts, -1, B.shape[1])
        delta = torch.einsum("eri,ero->eio" if layer.base_layer.is_transposed else "eri,ero->eoi", first, second) * scaling
        return (own.to(wide) + delta).to(own.dtype)
    W = plain_weight(layer.base_layer, layer.path).to(wide)
    if stack.scale is not None:
        W = W * (1 + stack.scale[index].to(wide))[:, None]
    merged = torch.addmm(W, B.t(), A, alpha=scaling).to(own.dtype)
    return merged.t().contiguous() if is_conv1d(layer.base_layer) else merged


def _merged_bias(layer: MeteoraLinear, index: int) -> Tensor | None:
    """Return the bias of a layer with one adapter merged; None if the adapter does not change it."""
    shift = layer.shift
    if shift is None or not bool(shift[index].any()):
        return None
    own = bias_of(layer.base_layer, layer.path)
    if own is None:
        raise UsageError(
            f"the adapter adds a bias to {layer.path}, and the base model has no bias there, so it cannot be merged", hint="export it with --adapter instead"
        )
    return (own.to(shift.dtype) + shift[index]).to(own.dtype)


@torch.no_grad()
def _set_weight(model: PreTrainedModel, path: str, weight: Tensor, bias: Tensor | None, *, of_experts: bool) -> None:
    if of_experts:
        parent, _, name = path.rpartition(".")
        getattr(model.get_submodule(parent), name).copy_(weight)
        return
    module = model.get_submodule(path)
    if bias is not None:
        module.bias.copy_(bias)
    embedding = model.get_input_embeddings()
    if module.weight is getattr(embedding, "weight", None):
        module.weight = nn.Parameter(weight, requires_grad=False)
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    else:
        module.weight.copy_(weight)
