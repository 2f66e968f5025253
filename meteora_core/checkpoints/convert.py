"""Converts a checkpoint in the authors' layout to a native checkpoint, tensor by tensor, without loading a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from meteora_core.adapters.magnitudes import WEIGHT_NAMES, check_tensor
from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.checkpoints.authors_layout import AuthorsAdapters, AuthorsLayout, describe_adapters, key_of, read_layout, scaling_of
from meteora_core.checkpoints.native import check_replaceable, rounding_table
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, WEIGHT_FILE, weight_metadata
from meteora_core.data.frames import INST
from meteora_core.errors import CheckpointError, StorageError, UsageError
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.json_files import write_json
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.ranges import check_temperature
from meteora_core.tensor_files import CHUNK, TensorFiles, TensorPlan, tensor_bytes, write_tensors
from meteora_core.text import listed

BaseTensors = Literal["changed", "all"]
_EMBEDDINGS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_OTHER_BASE = "the checkpoint belongs to another base model; pass the right one with --base"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        folder: The folder of the native checkpoint.
        adapters: The names of the adapters, in order.
        rank: The rank of every adapter.
        layers: The number of adapted linear layers.
        base_tensors: The names, in the base model, of the stored base tensors.
        size: The size of the weight file in bytes.
        sha256: The SHA-256 of the weight file.
    """

    folder: Path
    adapters: tuple[str, ...]
    rank: int
    layers: int
    base_tensors: tuple[str, ...]
    size: int
    sha256: str


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        top_k: Default number of adapters per token and layer of the checkpoint.
        routing_temperature: Default routing temperature T of the checkpoint.
        base_tensors: The base tensors to store: "changed" for those that differ from the base model, "all" for all of them without a comparison.
    """

    top_k: int = 2
    routing_temperature: float = 1.0
    base_tensors: BaseTensors = "changed"


def convert_authors(
    checkpoint: str | Path,
    folder: str | Path,
    base: BaseReference | str,
    *,
    adapter_dir: AuthorsAdapters | str | Path | None = None,
    options: ConvertOptions = ConvertOptions(),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Converted:
    """Write the gates and adapters of a checkpoint in the authors' layout as a native checkpoint, holding one adapter matrix at a time in memory.

    The authors' file also contains the whole base model, whose tensors are compared with those of ``base``. Equal tensors are left out; for tensors
    that are the base's rounded to the file's dtype, the rounding is recorded and repeated when the checkpoint is loaded; other tensors are stored. So
    :func:`~meteora_core.load_checkpoint` gives the same model as :func:`~meteora_core.load_authors_checkpoint`, bit for bit.

    Args:
        checkpoint: A safetensors file, an index of shards, or a folder that contains one of them.
        folder: The folder to write, which appears when it is complete.
        base: The base model that the checkpoint was trained on. With the base tensors "changed" it is read, and a hub model that is not in the cache
            is fetched; with "all" only its name is recorded.
        adapter_dir: The folder of adapters, as in :func:`~meteora_core.load_authors_checkpoint`.
        options: The defaults and the base tensors of the native checkpoint.
        overwrite: Whether to replace an existing folder.
        progress: The receiver of progress reports.

    Raises:
        CheckpointError: The checkpoint is unreadable or incomplete, or the base model has another vocabulary or other shapes.
        UsageError: top_k or routing_temperature is out of range, the folder exists, or it contains something other than a checkpoint.
        StorageError: The disk is full or not writable.
    """
    folder = Path(folder)
    reference = BaseReference(base) if isinstance(base, str) else base
    adapters, top_k, temperature = AuthorsAdapters.of(adapter_dir), options.top_k, options.routing_temperature
    if options.base_tensors not in ("changed", "all"):
        raise UsageError(f"unknown choice of base tensors {options.base_tensors!r}", hint="choose from: changed, all")
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists already", hint="pass --force to replace it, or choose another folder")
    check_replaceable(folder)
    layout = read_layout(checkpoint)
    infos = describe_adapters(layout, adapters)
    if not 1 <= top_k <= layout.count:
        raise UsageError(f"top_k is {top_k}, but the checkpoint has {layout.count} adapters", hint=f"choose --top-k between 1 and {layout.count}")
    check_temperature(temperature)
    stored, rounded, probe = tuple(sorted(layout.base)), dict[str, torch.dtype](), None
    if options.base_tensors == "changed":
        base_files = _open_base(reference, progress)
        _check_base(layout, base_files, reference)
        stored, rounded = _differences(layout, base_files, progress)
        probe = _probe(layout, base_files)
    _check_numbers(layout, infos, stored, progress)
    plans = list(_plans(layout, stored))
    config = _config(layout, infos, {"name": reference.name, "revision": reference.revision, "probe": probe}, stored, rounded, options)
    total = sum(plan.size for plan in plans)
    _check_space(folder, total)
    with atomic_folder(folder) as temporary:
        with progress.task("writing the checkpoint", total=total, unit="B") as task:
            digest = write_tensors(temporary / WEIGHT_FILE, plans, weight_metadata(config), on_bytes=task.update)
        write_json(temporary / CONFIG_FILE, {**config, "weights_sha256": digest})
        size = (temporary / WEIGHT_FILE).stat().st_size
    return Converted(folder, tuple(info.name for info in infos), layout.rank, len(layout.modules), stored, size, digest)


def _open_base(reference: BaseReference, progress: Progress) -> TensorFiles:
    location = locate_base(reference, progress=progress)
    if not Path(location).is_dir():
        from meteora_core.fetch.hub import HubOptions, download_repo

        location = str(download_repo(location, HubOptions(revision=reference.revision), progress=progress).path)
    return TensorFiles(location)


def _name_in_base(theirs: TensorFiles, name: str) -> str | None:
    """Return the name of a tensor in the base model's files, where a tied lm_head is the embedding; None if there is no such tensor."""
    if name in theirs:
        return name
    return _EMBEDDINGS if name == _HEAD and _EMBEDDINGS in theirs else None


def _check_base(layout: AuthorsLayout, theirs: TensorFiles, reference: BaseReference) -> None:
    """Raise CheckpointError if the base model's tensors have other names or shapes."""
    source = layout.tensors.path
    wanted = {name: layout.tensors.entries[key].shape for name, key in layout.base.items()}
    wanted |= {f"{path}.weight": (out, width) for path, (width, out) in layout.modules.items()}
    base_names = {name: _name_in_base(theirs, name) for name in wanted}
    for name in sorted(wanted, key=lambda name: name not in (_EMBEDDINGS, _HEAD)):
        theirs_name = base_names[name]
        if theirs_name is None:
            continue
        mine, shape = wanted[name], theirs.entries[theirs_name].shape
        if mine == shape:
            continue
        if name in (_EMBEDDINGS, _HEAD) and mine[:1] != shape[:1]:
            raise CheckpointError(f"{reference.name} has a vocabulary of {shape[0]} tokens, the checkpoint {source} one of {mine[0]}", hint=_OTHER_BASE)
        raise CheckpointError(f"{reference.name} has {name} of shape {list(shape)}, the checkpoint {source} of shape {list(mine)}", hint=_OTHER_BASE)
    if absent := sorted(name for name, theirs_name in base_names.items() if theirs_name is None):
        raise CheckpointError(f"{source} has tensors that {reference.name} lacks: {listed(absent)}", hint=_OTHER_BASE)
    if layout.base:
        missing = sorted(name for name in theirs.entries if name not in wanted and not name.endswith("rotary_emb.inv_freq"))
        missing = [name for name in missing if name != _HEAD or _compare(layout.tensors, layout.base[_EMBEDDINGS], theirs, name) == "changed"]
        if missing:
            raise CheckpointError(f"{source} lacks tensors of {reference.name}: {listed(missing)}", hint="copy or download the checkpoint again")


def _differences(layout: AuthorsLayout, theirs: TensorFiles, progress: Progress) -> tuple[tuple[str, ...], dict[str, torch.dtype]]:
    """Return the base tensors that differ from the base model's, and the dtype of those that only differ by rounding."""
    total = sum(layout.tensors.entries[key].end - layout.tensors.entries[key].begin for key in layout.base.values())
    changed, rounded = [], {}
    with progress.task("comparing with the base model", total=total, unit="B") as task:
        for name, key in sorted(layout.base.items()):
            theirs_name = _name_in_base(theirs, name)
            assert theirs_name is not None
            comparison = _compare(layout.tensors, key, theirs, theirs_name, task)
            if comparison == "changed":
                changed.append(name)
            elif comparison == "rounded":
                rounded[name] = layout.tensors.entries[key].torch_dtype
    return tuple(changed), rounded


def _compare(mine: TensorFiles, key: str, theirs: TensorFiles, name: str, task: ProgressBar | None = None) -> Literal["equal", "rounded", "changed"]:
    """Compare a tensor of the checkpoint with the base model's, block by block; "rounded" means equal after rounding to the checkpoint's dtype."""
    a, b = mine.entries[key], theirs.entries[name]
    numbers = CHUNK // 8
    result: Literal["equal", "rounded"] = "equal"
    for left, right in zip(mine.chunks(key, numbers * a.torch_dtype.itemsize), theirs.chunks(name, numbers * b.torch_dtype.itemsize), strict=True):
        if task is not None:
            task.update(len(left))
        if a.dtype == b.dtype:
            if left != right:
                return "changed"
            continue
        ours, base = torch.frombuffer(bytearray(left), dtype=a.torch_dtype), torch.frombuffer(bytearray(right), dtype=b.torch_dtype)
        if not torch.equal(ours, base.to(a.torch_dtype)):
            return "changed"
        if not torch.equal(ours.to(b.torch_dtype), base):
            result = "rounded"
    return result


def _probe(layout: AuthorsLayout, theirs: TensorFiles) -> list[float]:
    """Read from the base model's file the values that ``meteora_core.model.attach.probe_base`` takes from the loaded model."""
    paths = list(layout.modules)
    values: list[float] = []
    for path in paths[:: max(1, len(paths) // 16)][:16]:
        name = f"{path}.weight"
        count = prod(theirs.entries[name].shape)
        values += theirs.sample(name, range(0, count, max(1, count // 4))[:4])
    return values


def _check_numbers(layout: AuthorsLayout, infos: tuple[AdapterInfo, ...], kept: tuple[str, ...], progress: Progress) -> None:
    """Check that gates, adapters and stored base tensors are free of NaN, infinity and numbers that overflow. Raises CheckpointError."""
    scaling = torch.tensor([scaling_of(info) for info in infos], dtype=torch.float32)
    names = [info.name for info in infos]
    with progress.task("checking the numbers", total=len(layout.modules) + len(kept), unit="tensors") as task:
        for path in layout.modules:
            layout.gate(path)
            layout.stack(path, scaling, names)
            task.update(1)
        for name in kept:
            entry = layout.tensors.entries[layout.base[name]]
            if entry.dtype not in WEIGHT_NAMES:
                raise CheckpointError(f"{layout.base[name]} has dtype {entry.dtype}; weights are F16, BF16, F32 or F64", hint="choose --base-tensors changed")
            for block in layout.tensors.chunks(layout.base[name]):
                check_tensor(layout.base[name], torch.frombuffer(bytearray(block), dtype=entry.torch_dtype), margin=False)
            task.update(1)


def _plans(layout: AuthorsLayout, kept: tuple[str, ...]) -> Iterator[TensorPlan]:
    tensors = layout.tensors

    def copied(name: str, key: str) -> TensorPlan:
        entry = tensors.entries[key]
        return TensorPlan(name, entry.dtype, entry.shape, lambda: tensors.chunks(key))

    def turned(key: str) -> Callable[[], list[bytes]]:
        return lambda: [tensor_bytes(tensors.read(key).t())]

    for path in layout.modules:
        yield copied(f"{path}.gate", key_of(path, "moe_gate"))
        yield copied(f"{path}.lora_A", key_of(path, "lora_A"))
        entry = layout.entry(path, "lora_B")
        yield TensorPlan(f"{path}.lora_B", entry.dtype, entry.shape[::-1], turned(key_of(path, "lora_B")))
    for name in kept:
        yield copied(BASE + name, layout.base[name])


def _check_space(folder: Path, total: int) -> None:
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise StorageError(
            f"{folder.parent} has {free / 1e6:.0f} MB free, and the checkpoint needs {total / 1e6:.0f} MB", hint="free some space, or choose another folder"
        )


def _config(
    layout: AuthorsLayout,
    infos: tuple[AdapterInfo, ...],
    base: dict[str, Any],
    kept: tuple[str, ...],
    rounded: dict[str, torch.dtype],
    options: ConvertOptions,
) -> dict[str, Any]:
    scaling = torch.tensor([scaling_of(info) for info in infos], dtype=torch.float32).tolist()
    return {
        "format": 1,
        "base": base,
        "top_k": options.top_k,
        "temperature": options.routing_temperature,
        "adapters": [info.to_json() for info in infos],
        "frame": INST.to_json(),
        "gates": "trained",
        "contains": ["gates", "adapters", *(["base"] if kept else [])],
        "base_tensors": list(kept),
        "base_rounded": rounding_table(rounded),
        "modules": {
            path: {"in_features": width, "out_features": out, "ranks": [layout.rank] * layout.count, "scaling": scaling}
            for path, (width, out) in layout.modules.items()
        },
        "training": {"converted_from": str(layout.tensors.path)},
    }
