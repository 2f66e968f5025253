"""The native checkpoint: a folder with ``meteora_config.json`` and ``meteora.safetensors``.

It contains the gates, the adapters if they were trained with the gates or are embedded on request, and those tensors of the base model that were
changed (a converted checkpoint can have some). The configuration names the base model and a few of its weights, and each adapter's source and
hash, so that loading gives the model that was trained, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank, natural_order
from meteora_core.adapters.base_route import base_route, is_base_route, real_adapters
from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.fitting import OTHER_BASE
from meteora_core.adapters.joining import with_adapter
from meteora_core.adapters.magnitudes import check_stack, check_tensor
from meteora_core.adapters.peft_folder import WEIGHTS, AdapterInfo
from meteora_core.checkpoints.gate_statistics import STATISTICS
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, WEIGHT_FILE, check_weights, read_config
from meteora_core.checkpoints.parts import (
    TRANSFORMERS_CONFIG,
    TRANSFORMERS_WEIGHTS,
    SaveOptions,
    base_changes,
    base_tensors,
    checkpoint_parts,
    is_changed,
    is_ours,
    note_base_changes,
    rounding_table,
    write_files,
)
from meteora_core.checkpoints.stacks import read_stack
from meteora_core.data.frames import read_frame
from meteora_core.errors import AdapterError, CheckpointError, UsageError
from meteora_core.fetch.hub_names import SCHEME, adapter_folder
from meteora_core.files import atomic_folder, holds_other_things, other_entries, sha256
from meteora_core.model.attach import attach, detach, meteora_layers, same_base
from meteora_core.model.base import BaseReference, load_base, pick_device, pick_dtype
from meteora_core.names import is_name
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import is_regular
from meteora_core.routing import GateStart, meteora_of
from meteora_core.text import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora_core.adapters.peft_folder import Claim

__all__ = [
    "BASE",
    "CONFIG_FILE",
    "WEIGHT_FILE",
    "base_changes",
    "check_replaceable",
    "is_changed",
    "load_checkpoint",
    "note_base_changes",
    "read_checkpoint",
    "read_config",
    "refuse_untrained",
    "rounding_table",
    "save_checkpoint",
    "write_checkpoint",
]


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    base: BaseReference | None = None,
    adapters: bool = False,
    dtype: torch.dtype | None = None,
    training: dict[str, Any] | None = None,
) -> Path:
    """Save the gates of a model, and optionally its adapters, atomically.

    Args:
        model: A model with adapters attached.
        folder: The folder to write. An existing checkpoint is replaced after the new one is complete.
        base: The name of the base model; None means the name that it was loaded by, else ``model.name_or_path``.
        adapters: Whether to store the weights of the adapters; otherwise, loading the checkpoint reads them from their folders. Adapters that came
            from a checkpoint, or that :func:`meteora_core.model.attach.set_trainable` made trainable, are always stored.
        dtype: The dtype of the stored tensors; None keeps the dtype of each tensor, so that a loaded model gives the same logits bit for bit.
        training: A record of the training (settings, steps, losses).

    Returns:
        The folder that was written.

    Raises:
        UsageError: The model has no adapters, or the folder contains something other than a checkpoint.
        StorageError: The disk is full or not writable.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from meteora_core import AdapterBank, attach, save_checkpoint
        >>> bank = AdapterBank.from_peft({"gsm8k": "adapters/gsm8k", "strategyqa": "adapters/strategyqa"})
        >>> model = attach(AutoModelForCausalLM.from_pretrained("base"), bank, init="arrow")
        >>> sorted(file.name for file in save_checkpoint(model, "runs/arrow").iterdir())
        ['config.json', 'meteora.safetensors', 'meteora_config.json']
    """
    check_replaceable(folder)
    config, tensors = checkpoint_parts(model, folder, SaveOptions(base, adapters, dtype, training))
    return write_checkpoint(Path(folder), config, tensors)


def check_replaceable(folder: str | Path) -> None:
    """Check that a checkpoint may replace ``folder``: it does not exist, is empty, or contains only a checkpoint.

    Raises:
        UsageError: The folder contains something else, which would be lost; the message names it.
    """
    folder = Path(folder)
    if holds_other_things(folder, CONFIG_FILE):
        raise UsageError(f"{folder} is not a checkpoint, so it is not replaced", hint="choose another folder")
    ours = (TRANSFORMERS_CONFIG, TRANSFORMERS_WEIGHTS) if is_ours(folder) else ()
    if others := other_entries(folder, (CONFIG_FILE, WEIGHT_FILE, STATISTICS, "README.md", *ours)):
        raise UsageError(
            f"{folder} contains files that do not belong to the checkpoint and would be lost: {listed(others)}", hint="choose another folder, or move them away"
        )


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write the files of a checkpoint, atomically, with the hash of the weights in the configuration. Equal tensors give equal files.

    Raises:
        StorageError: The disk is full or not writable.
    """
    with atomic_folder(folder) as temporary:
        write_files(temporary, config, tensors)
    return folder


def refuse_untrained(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the configuration of a checkpoint says that its gates are untrained."""
    if config.get("gates") == "untrained":
        raise CheckpointError(
            f"the gates of {folder} are untrained: they choose adapters at random",
            hint="train them with `meteora train`; in Python, load_checkpoint(..., allow_untrained=True) loads them as they are",
        )


def load_checkpoint(
    folder: str | Path,
    base_model: PreTrainedModel | BaseReference | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    backend: str = "auto",
    adapters_dir: str | Path | None = None,
    allow_untrained: bool = False,
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Load a native checkpoint onto its base model.

    Args:
        folder: The folder of the checkpoint, or its id on the hub: ``user/name`` or ``user/name@revision``.
        base_model: A loaded base model, which is changed in place, a folder, a name, or a :class:`~meteora_core.model.base.BaseReference`, which may
            name a revision and allow remote code; None means the base model that the checkpoint names.
        dtype: The dtype of the model; None or "auto" means float32 on a CPU and bfloat16 on a GPU. Ignored for a loaded base model.
        device: The device of the model; None or "auto" means a GPU if there is one. Ignored for a loaded base model.
        backend: The implementation of the sum over adapters: "auto" or a name in ``meteora_kernels.BACKENDS``.
        adapters_dir: The folder that contains the adapter folders by name, if they were moved after training.
        allow_untrained: Whether to load gates that were saved before any training.
        progress: The receiver of progress reports.

    Returns:
        The model, in evaluation mode, with ``model.meteora`` set.

    Raises:
        CheckpointError: Files are missing or broken, keys are missing or unknown (the message names the first five), the base model differs, an
            adapter is not the one that the gates were trained with, or the gates are untrained.
        UsageError: The model has adapters already, or the backend is unknown.
        DownloadError: The checkpoint, its adapters or its base model cannot be fetched from the hub.

    Example:
        >>> from meteora_core import load_checkpoint
        >>> model = load_checkpoint("runs/mine", dtype="float32")
        >>> model.meteora.names, model.meteora.top_k
        (('gsm8k', 'strategyqa'), 2)
    """
    folder = checkpoint_folder(folder, progress=progress)
    if not allow_untrained:
        refuse_untrained(folder, read_config(folder))
    config, tensors, bank = read_checkpoint(folder, adapters_dir, progress)
    if base_model is None or isinstance(base_model, BaseReference | str | Path):
        target_device = pick_device(device)
        if base_model is None:
            base_model = BaseReference(config["base"]["name"], config["base"].get("revision"))
        reference = base_model if isinstance(base_model, BaseReference) else BaseReference(str(base_model))
        model = load_base(reference, dtype=pick_dtype(dtype, target_device), device=target_device, progress=progress)
    else:
        model = base_model
    try:
        attach(model, bank, top_k=config["top_k"], temperature=config["temperature"], backend=backend, init="zeros")
    except AdapterError as error:
        hint = f"it was trained on {config['base']['name']}" if error.hint in (None, OTHER_BASE) else error.hint
        raise CheckpointError(f"the checkpoint {folder} does not fit this base model: {error.message}", hint=hint) from error
    known = meteora_of(model).provenance
    if not same_base(known.base_probe, config["base"].get("probe")):
        detach(model)
        raise CheckpointError(
            f"the base model's weights are not those that {folder} was trained on",
            hint=f"it was trained on {config['base']['name']}" + (f" (revision {config['base']['revision']})" if config["base"].get("revision") else ""),
        )
    try:
        for path, layer in meteora_layers(model):
            check_tensor(f"the gate of {path} in {folder}", tensors[f"{path}.gate"], dtype=layer.gate.dtype)
    except CheckpointError:
        detach(model)
        raise
    with torch.no_grad():
        for path, layer in meteora_layers(model):
            layer.gate.copy_(tensors[f"{path}.gate"])
    known.gates, start = config.get("gates") or "trained", config.get("gates_start")
    known.start = GateStart(start["init"], start["seed"], tuple(bank.modules)) if start else None
    known.frame = read_frame(config.get("frame"))
    if "adapters" in config["contains"]:
        known.embedded = True
    _restore_base(model, folder, config, tensors)
    return model.eval()


def _restore_base(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Copy the base tensors of the checkpoint into the model. On an error, nothing is copied and the adapters are detached."""
    names = config.get("base_tensors", [])
    rounded = {name: getattr(torch, dtype) for dtype, listed in config["base_rounded"].items() for name in listed}
    if not names and not rounded:
        return
    known = base_tensors(model)
    for name in names:
        target, stored = known.get(name), tensors[BASE + name]
        if target is None or not target.is_floating_point() or target.shape != stored.shape or target.is_meta:
            detach(model)
            mine = "it has no such tensor"
            if target is not None:
                mine = "its tensor is offloaded" if target.is_meta else f"its tensor is {target.dtype} of shape {list(target.shape)}"
            raise CheckpointError(
                f"the base model cannot take {name} {list(stored.shape)} of the checkpoint {folder}: {mine}",
                hint=f"it was trained on {config['base']['name']}; tensors of a quantised base cannot be replaced",
            )
        try:
            check_tensor(f"{name} in {folder}", stored, dtype=target.dtype, margin=False)
        except CheckpointError:
            detach(model)
            raise
    with torch.no_grad():
        for name in names:
            known[name].copy_(tensors[BASE + name])
        for name, dtype in rounded.items():
            if name in known and known[name].is_floating_point():
                known[name].copy_(known[name].to(dtype))
    note_base_changes(model, names, rounded)


def _read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHT_FILE
    check_weights(folder, config)
    if sha256(file) != config["weights_sha256"]:
        raise CheckpointError(f"{file} is not the file that was saved: its hash differs", hint="copy or download the checkpoint again")
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, OSError) as broken:
        raise CheckpointError(f"{file} cannot be read: {broken}", hint="copy or download the checkpoint again") from broken
    for name, tensor in tensors.items():
        check_tensor(f"{name} in {file}", tensor, margin=not name.startswith(BASE))
    return tensors


def _bank(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapters_dir: Path | None, progress: Progress) -> AdapterBank:
    """Return the adapters that the gates were trained with, from the checkpoint or from their folders, whose hashes must agree."""
    infos = tuple(map(AdapterInfo.from_entry, config["adapters"]))
    if "adapters" in config["contains"]:
        stacks = {}
        for path in sorted(config["modules"], key=natural_order):
            stacks[path] = read_stack(path, config["modules"][path], tensors)
            check_stack(path, stacks[path], [info.name for info in infos], stacks[path].A.dtype, CheckpointError)
        return AdapterBank(infos, stacks)
    folders = {info.name: locate_adapter(info, folder, adapters_dir, progress) for info in real_adapters(infos)}
    bank = AdapterBank.from_peft(folders, progress=progress)
    for index, info in enumerate(infos):
        if is_base_route(info):
            bank = with_adapter(bank, base_route(), index)
    renamed = config["renamed"]
    bank = replace(bank, modules={renamed.get(path, path): stack for path, stack in bank.modules.items()})
    if set(bank.modules) != set(config["modules"]):
        different = listed(sorted(set(bank.modules) ^ set(config["modules"])))
        raise CheckpointError(
            f"the adapters' layers are not those of the checkpoint {folder}: {different}", hint="restore the adapters that it was trained with"
        )
    for path, stack in bank.modules.items():
        saved = config["modules"][path]
        sizes, recorded = (stack.in_features, stack.out_features), (saved["in_features"], saved["out_features"])
        if sizes != recorded or stack.experts != saved.get("experts", 1):
            raise CheckpointError(
                f"{folder / CONFIG_FILE} says that {path} maps {recorded[0]} to {recorded[1]} features; its adapters map {sizes[0]} to {sizes[1]}",
                hint="copy or download the checkpoint again",
            )
        for index, info in enumerate(infos):
            now, then = (stack.ranks[index], float(stack.scaling[index])), (saved["ranks"][index], saved["scaling"][index])
            if now[0] != then[0] or not math.isclose(now[1], then[1], rel_tol=1e-2):
                raise CheckpointError(
                    f"adapter {info.name!r} at {folders[info.name]} is not as it was when the gates were trained: on {path} its rank and scaling are"
                    f" {now[0]} and {now[1]:g}, and were {then[0]} and {then[1]:g}",
                    hint="restore r, lora_alpha, use_rslora and the patterns in its adapter_config.json, or train the gates again",
                )
    return replace(bank, adapters=infos, claims=tuple(_renamed(claim, renamed) for claim in bank.claims))


def _renamed(claim: Claim, renamed: Mapping[str, str]) -> Claim:
    """Return a claim with the base model's names of its modules. Its targets were checked when the checkpoint was saved."""
    if not renamed:
        return claim
    copies = tuple(replace(copy, path=renamed.get(copy.path, copy.path)) for copy in claim.copies)
    return replace(claim, config=None, copies=copies, paths=frozenset(renamed.get(path, path) for path in claim.paths))


def locate_adapter(info: AdapterInfo, folder: Path, adapters_dir: Path | None, progress: Progress) -> Path:
    """Return the present folder of an adapter, after checking that it has the weights that the gates were trained with.

    Args:
        info: The description of the adapter in the checkpoint.
        folder: The folder of the checkpoint.
        adapters_dir: The folder that contains the adapter folders by name, if they were moved after training.
        progress: The receiver of progress reports.

    Raises:
        CheckpointError: The adapter is missing, or has other weights.
        DownloadError: It is on the hub and cannot be fetched.
    """
    on_hub = info.source.startswith(SCHEME)
    candidates = [] if on_hub else [folder / info.source, Path(info.source)]
    if is_name(info.name):  # the configuration is untrusted
        candidates.append(folder / "adapters" / info.name)
        candidates[:0] = [] if adapters_dir is None else [adapters_dir / info.name]
    location = next((place for place in map(find_adapter, candidates) if place is not None and is_regular(place / WEIGHTS)), None)
    if location is None and on_hub:
        location = find_adapter(adapter_folder(info.source, progress=progress))
    if location is None:
        where = f"{info.source} (seen from {Path.cwd()})" if not Path(info.source).is_absolute() else info.source
        looked = f", and not in {adapters_dir} either" if adapters_dir is not None else ""
        raise CheckpointError(
            f"adapter {info.name!r} of the checkpoint {folder} is not at {where}{looked}",
            hint="pass --adapters DIR, the folder that holds the adapter folders, or run from the folder where it was trained",
        )
    if sha256(location / WEIGHTS) != info.sha256:
        raise CheckpointError(
            f"adapter {info.name!r} at {location} is not the one that the gates were trained with: its hash differs",
            hint="restore the adapter, pass --adapters DIR with the right folders, or train the gates again",
        )
    return location


def read_checkpoint(
    folder: str | Path, adapters_dir: str | Path | None = None, progress: Progress = SILENT
) -> tuple[dict[str, Any], dict[str, Tensor], AdapterBank]:
    """Read the parts of a checkpoint, without its base model.

    Args:
        folder: The folder of the checkpoint, or its id on the hub.
        adapters_dir: The folder that contains the adapter folders by name, if they were moved after training.
        progress: The receiver of progress reports.

    Returns:
        The configuration, the tensors of the weight file by name, and the bank of adapters.

    Raises:
        CheckpointError: A file is missing or broken, or an adapter is not the one that the gates were trained with.
    """
    folder = checkpoint_folder(folder, progress=progress)
    config = read_config(folder)
    tensors = _read_weights(folder, config)
    return config, tensors, _bank(folder, config, tensors, Path(adapters_dir) if adapters_dir else None, progress)
