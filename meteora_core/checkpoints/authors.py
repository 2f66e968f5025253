"""Loads a checkpoint in the authors' layout onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.magnitudes import check_tensor
from meteora_core.checkpoints.authors_layout import AuthorsAdapters, AuthorsLayout, describe_adapters, key_of, read_layout, scaling_of
from meteora_core.checkpoints.native import note_base_changes
from meteora_core.data.frames import INST
from meteora_core.errors import CheckpointError, MeteoraError, UsageError
from meteora_core.model.attach import attach, detach, meteora_layers
from meteora_core.model.base import BaseReference, load_base, pick_device, pick_dtype
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import find_meteora, meteora_of
from meteora_core.text import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")


def load_authors_checkpoint(
    base_model: PreTrainedModel | BaseReference | str | Path,
    adapter_dir: AuthorsAdapters | str | Path | None,
    checkpoint: str | Path,
    top_k: int = 2,
    temperature: float = 1.0,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> PreTrainedModel:
    """Load a checkpoint in the authors' layout (see :mod:`meteora_core.checkpoints.authors_layout`) onto its base model.

    The checkpoint's tensors replace those of the base model and of the adapter folders, which give names, ranks and alphas.

    Args:
        base_model: A loaded base model, a folder, a name in the catalog, a hub id, or a :class:`~meteora_core.model.base.BaseReference`, which may name
            a revision and allow remote code. A loaded base model is changed in place; if it is quantised, its linear layers keep their weights.
        adapter_dir: The folder that contains one PEFT folder per adapter. With None, the scaling is 16 / rank, and 28 adapters have the names of
            the 28 tasks. :class:`~meteora_core.checkpoints.authors_layout.AuthorsAdapters` can state other names or another alpha.
        checkpoint: A safetensors file, an index of shards, or a folder that contains one of them. Pickles are refused.
        top_k: Number of adapters per token and layer, from 1 to N.
        temperature: Routing temperature T, above 0.
        dtype: The dtype of the model; None or "auto" means float32 on a CPU and bfloat16 on a GPU. Ignored for a loaded base model.
        device: The device of the model; None or "auto" means a GPU if there is one. Ignored for a loaded base model.
        backend: The implementation of the sum over adapters: "auto" or a name in ``meteora_kernels.BACKENDS``.

    Returns:
        The model, in evaluation mode, with ``model.meteora`` set.

    Raises:
        CheckpointError: A file is missing, cut short, a pickle or in another layout; tensors are missing or unknown (the message names the first five);
            the base model has another vocabulary or other shapes; or the adapters do not fit. The base model remains unchanged.
        AdapterError: An adapter's configuration is missing or describes another kind of adapter.
        UsageError: top_k, temperature or backend is out of range, or the model has adapters already.

    Example:
        >>> from meteora_core import load_authors_checkpoint
        >>> checkpoint = "llama3_8b_meteora/top_2/model.safetensors"
        >>> model = load_authors_checkpoint("meta-llama/Meta-Llama-3-8B", "llama3_8b_peft", checkpoint, temperature=15)  # doctest: +SKIP
    """
    adapters = AuthorsAdapters.of(adapter_dir)
    if isinstance(base_model, BaseReference | str | Path):
        describe_adapters(read_layout(checkpoint), adapters)  # raises before a base model is loaded
        target_device = pick_device(device)
        reference = base_model if isinstance(base_model, BaseReference) else BaseReference(str(base_model))
        base_model = load_base(reference, dtype=pick_dtype(dtype, target_device), device=target_device)
    return attach_authors(base_model, checkpoint, adapters, top_k=top_k, temperature=temperature, backend=backend)


def attach_authors(
    model: PreTrainedModel,
    checkpoint: str | Path,
    adapters: AuthorsAdapters,
    *,
    top_k: int = 2,
    temperature: float = 1.0,
    backend: str = "auto",
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Attach a checkpoint in the authors' layout to its loaded base model, in place.

    Args:
        model: The loaded base model.
        checkpoint: A safetensors file, an index of shards, or a folder that contains one of them.
        adapters: The names, ranks and alphas of the checkpoint's adapters, as far as they are known.
        top_k: Number of adapters per token and layer, from 1 to N.
        temperature: Routing temperature T, above 0.
        backend: The implementation of the sum over adapters: "auto" or a name in ``meteora_kernels.BACKENDS``.
        progress: The receiver of progress reports.

    Raises:
        MeteoraError: The same errors as in :func:`load_authors_checkpoint`.
    """
    layout = read_layout(checkpoint)
    infos = describe_adapters(layout, adapters)
    if find_meteora(model) is not None:
        raise UsageError("this model has adapters attached already", hint="call meteora_core.detach(model) first")
    targets = _base_targets(layout, model)
    scaling = torch.tensor([scaling_of(info) for info in infos], dtype=torch.float32)
    with progress.task("reading adapters and gates", total=len(layout.modules), unit="layers") as task:
        stacks = {}
        for path in layout.modules:
            stacks[path] = layout.stack(path, scaling, [info.name for info in infos])
            task.update(1)
    gates = {path: layout.gate(path) for path in layout.modules}
    changed, rounded = _compare_base(layout, targets, progress)
    try:
        attach(model, AdapterBank(infos, stacks), top_k=top_k, temperature=temperature, backend=backend, init="zeros")
    except UsageError:
        raise
    except MeteoraError as error:
        raise CheckpointError(f"the checkpoint {checkpoint} does not fit this base model: {error.message}", hint=error.hint) from error
    try:
        for path, layer in meteora_layers(model):
            check_tensor(key_of(path, "moe_gate"), gates[path], dtype=layer.gate.dtype)
    except CheckpointError:
        detach(model)
        raise
    with torch.no_grad():
        for path, layer in meteora_layers(model):
            layer.gate.copy_(gates[path])
        for name in (*changed, *rounded):
            targets[name].detach().copy_(layout.tensors.read(layout.base[name]))
    known = meteora_of(model).provenance
    known.gates, known.frame = "trained", INST
    note_base_changes(model, changed, rounded)
    return model.eval()


def _base_targets(layout: AuthorsLayout, model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensor for each base tensor of the checkpoint, after checking that all fit. Nothing is written.

    The weights of quantised linear layers are left out, because they cannot be replaced.
    """
    checkpoint = layout.tensors.path
    known = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    targets, quantized = {}, set()
    for name, key in sorted(layout.base.items(), key=lambda item: not item[0].endswith(_VOCABULARY)):
        shape = layout.tensors.entries[key].shape
        target = known.get(name)
        if target is None:
            continue
        if not target.is_floating_point():
            quantized.add(name.rpartition(".")[0])
            continue
        if tuple(target.shape) != shape:
            raise _other_base(checkpoint, model, name, tuple(target.shape), shape)
        targets[name] = target
    if unknown := [layout.base[name] for name in layout.base if name not in known]:
        raise CheckpointError(f"{checkpoint} has tensors that {_called(model)} lacks: {listed(unknown)}", hint="the checkpoint belongs to another base model")
    if layout.base:
        given = {id(known[name]) for name in layout.base}
        missing = [name for name, tensor in known.items() if id(tensor) not in given and name.rpartition(".")[0] not in quantized]
        if missing:
            raise CheckpointError(
                f"{checkpoint} lacks tensors of {_called(model)}: {listed(_file_key(layout, name) for name in missing)}",
                hint="the checkpoint is incomplete, or belongs to another base model",
            )
    _check_tied(layout, targets)
    return targets


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _file_key(layout: AuthorsLayout, name: str) -> str:
    path, _, kind = name.rpartition(".")
    return f"base_model.model.{path}.base_layer.{kind}" if path in layout.modules else f"base_model.model.{name}"


def _called(model: nn.Module) -> str:
    return f"the base model {getattr(model, 'name_or_path', '') or type(model).__name__}"


def _other_base(checkpoint: Path, model: nn.Module, name: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> CheckpointError:
    hint = "the checkpoint belongs to another base model"
    if name.endswith(_VOCABULARY) and mine[:1] != theirs[:1]:
        shapes = f"{name} is {list(mine)} against {list(theirs)}"
        return CheckpointError(f"{_called(model)} has a vocabulary of {mine[0]} tokens, the checkpoint {checkpoint} one of {theirs[0]} ({shapes})", hint=hint)
    return CheckpointError(f"{_called(model)} has {name} of shape {list(mine)}, the checkpoint {checkpoint} of shape {list(theirs)}", hint=hint)


def _check_tied(layout: AuthorsLayout, targets: dict[str, Tensor]) -> None:
    """Check that two stored tensors are equal if the model ties them together. Raises CheckpointError."""
    seen: dict[int, str] = {}
    for name, target in targets.items():
        first = seen.setdefault(id(target), name)
        if first != name and not torch.equal(layout.tensors.read(layout.base[first]), layout.tensors.read(layout.base[name])):
            raise CheckpointError(
                f"the checkpoint {layout.tensors.path} has different {first} and {name}, which the base model ties together",
                hint="set tie_word_embeddings to false in the base model's config.json",
            )


def _compare_base(layout: AuthorsLayout, targets: dict[str, Tensor], progress: Progress) -> tuple[list[str], dict[str, torch.dtype]]:
    """Return the base tensors that differ from the base model's, and the dtype of those that only differ by rounding. Nothing is written.

    Raises:
        CheckpointError: A base tensor contains a number that the base model's dtype cannot represent.
    """
    changed, rounded = [], {}
    with progress.task("comparing base tensors", total=len(targets), unit="tensors") as task:
        for name, target in targets.items():
            before, tensor = target.detach(), layout.tensors.read(layout.base[name]).to(target.device)
            if not torch.equal(before.to(tensor.dtype), tensor):
                if not tensor.is_floating_point():
                    raise CheckpointError(f"{layout.base[name]} of {layout.tensors.path} has dtype {tensor.dtype}, the base model's has {before.dtype}")
                check_tensor(layout.base[name], tensor, dtype=target.dtype, margin=False)
                changed.append(name)
            elif not torch.equal(before, tensor.to(before.dtype)):
                rounded[name] = tensor.dtype
            task.update(1)
    if skipped := [name for name in layout.base if name not in targets]:
        progress.note(f"{len(skipped)} linear layers of the base model are quantised and keep their weights")
    return changed, rounded
