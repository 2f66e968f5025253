"""Meteora's own checkpoint: ``meteora_config.json`` and ``meteora.safetensors`` in one folder.

Gates always; adapters where they were trained or are embedded on request; tensors of the base model where they are not the base's own any more
(a converted checkpoint can hold such). The configuration names the base model and a few of its weights, and each adapter's source and hash, so
that what is loaded is what was trained, or an error.
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
from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.fitting import OTHER_BASE
from meteora_core.adapters.magnitudes import check_stack, check_tensor
from meteora_core.adapters.peft_folder import WEIGHTS, AdapterInfo
from meteora_core.adapters.stack import Stack
from meteora_core.checkpoints.gate_statistics import STATISTICS
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, FORMAT, WEIGHT_FILE, check_weights, read_config
from meteora_core.checkpoints.parts import (
    TRANSFORMERS_CONFIG,
    TRANSFORMERS_WEIGHTS,
    base_changes,
    base_tensors,
    checkpoint_parts,
    is_changed,
    is_ours,
    note_base_changes,
    rounding_table,
    write_files,
)
from meteora_core.data.frames import read_frame
from meteora_core.errors import AdapterError, CheckpointError, UsageError
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
    "FORMAT",
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
    """Save the gates of an attached model (and its adapters), atomically.

    Args:
        model: A model with adapters attached.
        folder: Written anew; an old one is replaced when all is on disk.
        base: The base model's name; None takes the one that it was loaded by, else ``model.name_or_path``.
        adapters: Store the adapters' weights too. Needed when they were trained together with the gates; else they are read from
            their folders again when the checkpoint is loaded. Adapters that came out of a checkpoint, or that
            :func:`meteora_core.model.attach.set_trainable` let train, are stored in any case.
        dtype: Of the stored tensors; None keeps each tensor's own, so that a loaded model gives the same logits bit for bit.
        training: What to note of how it was made (settings, steps, losses).

    Returns:
        The folder.

    Raises:
        UsageError: Nothing is attached, or the folder holds something that is no checkpoint.
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
    config, tensors = checkpoint_parts(model, place=folder, base=base, adapters=adapters, dtype=dtype, training=training)
    return write_checkpoint(Path(folder), config, tensors)


def check_replaceable(folder: str | Path) -> None:
    """Check that a checkpoint may replace ``folder``: it does not exist, is empty, or holds a checkpoint and nothing else.

    Raises:
        UsageError: It holds something else, which would be lost; the message names it.
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
    """Write the files of a checkpoint, atomically; adds the hash of the weights to the configuration. Equal tensors make equal files.

    Raises:
        StorageError: The disk is full or not writable.
    """
    with atomic_folder(folder) as temporary:
        write_files(temporary, config, tensors)
    return folder


def refuse_untrained(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the configuration of a checkpoint says that its gates are untrained."""
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
        folder: The checkpoint.
        base_model: A loaded base model (it is changed in place), a folder, a name, or a :class:`~meteora_core.model.base.BaseReference`, which may name
            a revision and allow remote code; None takes the one that the checkpoint names.
        dtype: Of the model; None or "auto" is float32 on a CPU and bfloat16 on a GPU. Ignored with a loaded base model.
        device: None or "auto" is a GPU when there is one. Ignored with a loaded base model.
        backend: "auto" or a name of ``meteora_kernels.BACKENDS``.
        adapters_dir: The folder that the adapter folders were moved to, if they were; each is looked up there by its name.
        allow_untrained: Whether gates that were saved before any training are loaded.
        progress: Where to report.

    Returns:
        The model, in evaluation mode, with ``model.meteora`` set.

    Raises:
        CheckpointError: Files are missing or broken, keys are missing or extra (the first five named), the base model differs, an
            adapter is not the one that the gates were trained with, or the gates are untrained.
        UsageError: The model has adapters attached already, or an unknown backend.

    Example:
        >>> from meteora_core import load_checkpoint
        >>> model = load_checkpoint("runs/mine", dtype="float32")
        >>> model.meteora.names, model.meteora.top_k
        (('gsm8k', 'strategyqa'), 2)
    """
    folder = Path(folder)
    if not allow_untrained:
        refuse_untrained(folder, read_config(folder))
    config, tensors, bank = read_checkpoint(folder, adapters_dir, progress)
    if base_model is None or isinstance(base_model, BaseReference | str | Path):
        place = pick_device(device)
        if base_model is None:
            base_model = BaseReference(config["base"]["name"], config["base"].get("revision"))
        reference = base_model if isinstance(base_model, BaseReference) else BaseReference(str(base_model))
        model = load_base(reference, dtype=pick_dtype(dtype, place), device=place, progress=progress)
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
    """Copy the base tensors that the checkpoint carries into the model; on an error nothing is copied and the adapters are out again."""
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
                mine = "its own is offloaded" if target.is_meta else f"its own is {target.dtype} of shape {list(target.shape)}"
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
    """The adapters that the gates were trained with: out of the checkpoint, or from their folders, whose hashes must agree."""
    infos = tuple(map(AdapterInfo.from_entry, config["adapters"]))
    if "adapters" in config["contains"]:
        stacks = {}
        for path in sorted(config["modules"], key=natural_order):
            module = config["modules"][path]
            scaling = torch.tensor(module["scaling"], dtype=torch.float32)
            stacks[path] = Stack(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], tuple(module["ranks"]), scaling)
            check_stack(path, stacks[path], [info.name for info in infos], stacks[path].A.dtype, CheckpointError)
        return AdapterBank(infos, stacks)
    folders = {info.name: _folder_of(info, folder, adapters_dir) for info in infos}
    bank = AdapterBank.from_peft(folders, progress=progress)
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
        if sizes != recorded:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} says that {path} maps {recorded[0]} to {recorded[1]} features; its adapters map {sizes[0]} to {sizes[1]}",
                hint="copy or download the checkpoint again",
            )
        for place, info in enumerate(infos):
            now, then = (stack.ranks[place], float(stack.scaling[place])), (saved["ranks"][place], saved["scaling"][place])
            if now[0] != then[0] or not math.isclose(now[1], then[1], rel_tol=1e-2):
                raise CheckpointError(
                    f"adapter {info.name!r} at {folders[info.name]} is not as it was when the gates were trained: on {path} its rank and scaling are"
                    f" {now[0]} and {now[1]:g}, and were {then[0]} and {then[1]:g}",
                    hint="restore r, lora_alpha, use_rslora and the patterns in its adapter_config.json, or train the gates again",
                )
    return replace(bank, adapters=infos, claims=tuple(_renamed(claim, renamed) for claim in bank.claims))


def _renamed(claim: Claim, renamed: Mapping[str, str]) -> Claim:
    """A claim whose modules have their names in the base model; its targets were checked when the checkpoint was made."""
    if not renamed:
        return claim
    copies = tuple(replace(copy, path=renamed.get(copy.path, copy.path)) for copy in claim.copies)
    return replace(claim, config=None, copies=copies, paths=frozenset(renamed.get(path, path) for path in claim.paths))


def _folder_of(info: AdapterInfo, folder: Path, adapters_dir: Path | None) -> Path:
    """Where an adapter's folder is now, holding the weights that the gates were trained with."""
    places = [Path(info.source), folder / info.source]
    if is_name(info.name):  # the configuration may have been written by anyone
        places.append(folder / "adapters" / info.name)
        places[:0] = [] if adapters_dir is None else [adapters_dir / info.name]
    found = next((place for place in map(find_adapter, places) if place is not None and is_regular(place / WEIGHTS)), None)
    if found is None:
        where = f"{info.source} (seen from {Path.cwd()})" if not Path(info.source).is_absolute() else info.source
        looked = f", and not in {adapters_dir} either" if adapters_dir is not None else ""
        raise CheckpointError(
            f"adapter {info.name!r} of the checkpoint {folder} is not at {where}{looked}",
            hint="pass --adapters DIR, the folder that holds the adapter folders, or run from the folder where it was trained",
        )
    if sha256(found / WEIGHTS) != info.sha256:
        raise CheckpointError(
            f"adapter {info.name!r} at {found} is not the one that the gates were trained with: its hash differs",
            hint="restore the adapter, pass --adapters DIR with the right folders, or train the gates again",
        )
    return found


def read_checkpoint(
    folder: str | Path, adapters_dir: str | Path | None = None, progress: Progress = SILENT
) -> tuple[dict[str, Any], dict[str, Tensor], AdapterBank]:
    """The parts of a checkpoint, without its base model.

    Args:
        folder: The checkpoint.
        adapters_dir: Where the adapter folders lie now, if they were moved.
        progress: Where to report.

    Returns:
        Its configuration, the tensors of its weight file, and its adapters.

    Raises:
        CheckpointError: As :func:`load_checkpoint`.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_weights(folder, config)
    return config, tensors, _bank(folder, config, tensors, Path(adapters_dir) if adapters_dir else None, progress)
