"""Turn a checkpoint in the authors' layout into a native folder, tensor by tensor, without loading a model."""

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
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, FORMAT, WEIGHT_FILE, weight_metadata
from meteora_core.data.frames import INST
from meteora_core.errors import CheckpointError, StorageError, UsageError
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.json_files import write_json
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.tensor_files import CHUNK, TensorFiles, TensorPlan, tensor_bytes, write_tensors
from meteora_core.text import listed

BaseTensors = Literal["changed", "all"]
_EMBEDDINGS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_OTHER_BASE = "the checkpoint belongs to another base model; pass the right one with --base"


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        folder: The native checkpoint.
        adapters: The adapters' names, in order.
        rank: The rank of each.
        layers: How many linears are adapted.
        base_tensors: The base tensors that were stored, by their names in the base model.
        size: Bytes of the weight file.
        sha256: Its hash.
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
    """What a converted checkpoint stores.

    Attributes:
        top_k: Adapters per token and layer, the default of the checkpoint.
        routing_temperature: T of the gates' softmax, the default of the checkpoint.
        base_tensors: "changed", or "all" to store every base tensor without a comparison.
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
    """Write gates and adapters of a checkpoint in the authors' layout as a native folder; what is held in memory is one adapter matrix.

    The authors' file also holds the whole base model. Its tensors are compared with those of ``base``: what is the base's own is left out, what is the
    base's own rounded to the file's dtype is noted and rounded again when the checkpoint is loaded, and what has other numbers is stored beside the
    gates. So :func:`~meteora_core.load_checkpoint` gives the same model as :func:`~meteora_core.load_authors_checkpoint`, bit for bit.

    Args:
        checkpoint: A safetensors file, an index of shards, or a folder that holds one.
        folder: To be written; appears when it is complete.
        base: The base model that it was trained on; it is read for the base tensors "changed" (a hub model is fetched if it is not in the cache) and
            only noted for "all".
        adapter_dir: As in :func:`~meteora_core.load_authors_checkpoint`.
        options: What the checkpoint stores.
        overwrite: Replace a folder that is there.
        progress: Where to report.

    Raises:
        CheckpointError: The checkpoint cannot be read or is incomplete, or the base model has another vocabulary or other shapes.
        UsageError: top_k or routing_temperature is out of range, the folder exists, or it holds something that is no checkpoint.
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
    if not 0 < temperature < float("inf"):
        raise UsageError(f"the routing temperature T is {temperature}, it must be above 0 and finite")
    kept, rounded, probe = tuple(sorted(layout.base)), dict[str, torch.dtype](), None
    if options.base_tensors == "changed":
        theirs = _open_base(reference, progress)
        _check_base(layout, theirs, reference)
        kept, rounded = _differences(layout, theirs, progress)
        probe = _probe(layout, theirs)
    _check_numbers(layout, infos, kept, progress)
    plans = list(_plans(layout, kept))
    config = _config(layout, infos, {"name": reference.name, "revision": reference.revision, "probe": probe}, kept, rounded, options)
    total = sum(plan.size for plan in plans)
    _check_space(folder, total)
    with atomic_folder(folder) as temporary:
        with progress.task("writing the checkpoint", total=total, unit="B") as task:
            digest = write_tensors(temporary / WEIGHT_FILE, plans, weight_metadata(config), on_bytes=task.update)
        write_json(temporary / CONFIG_FILE, {**config, "weights_sha256": digest})
        size = (temporary / WEIGHT_FILE).stat().st_size
    return Converted(folder, tuple(info.name for info in infos), layout.rank, len(layout.modules), kept, size, digest)


def _open_base(reference: BaseReference, progress: Progress) -> TensorFiles:
    place = locate_base(reference, progress=progress)
    if not Path(place).is_dir():
        from meteora_core.fetch.hub import HubOptions, download_repo

        place = str(download_repo(place, HubOptions(revision=reference.revision), progress=progress).path)
    return TensorFiles(place)


def _name_in_base(theirs: TensorFiles, name: str) -> str | None:
    """The name of the base model's tensor; a tied lm_head is the embedding."""
    if name in theirs:
        return name
    return _EMBEDDINGS if name == _HEAD and _EMBEDDINGS in theirs else None


def _check_base(layout: AuthorsLayout, theirs: TensorFiles, reference: BaseReference) -> None:
    """Refuse a base model whose tensors have other names or shapes."""
    source = layout.tensors.path
    wanted = {name: layout.tensors.entries[key].shape for name, key in layout.base.items()}
    wanted |= {f"{path}.weight": (out, width) for path, (width, out) in layout.modules.items()}
    found = {name: _name_in_base(theirs, name) for name in wanted}
    for name in sorted(wanted, key=lambda name: name not in (_EMBEDDINGS, _HEAD)):
        theirs_name = found[name]
        if theirs_name is None:
            continue
        mine, shape = wanted[name], theirs.entries[theirs_name].shape
        if mine == shape:
            continue
        if name in (_EMBEDDINGS, _HEAD) and mine[:1] != shape[:1]:
            raise CheckpointError(f"{reference.name} has a vocabulary of {shape[0]} tokens, the checkpoint {source} one of {mine[0]}", hint=_OTHER_BASE)
        raise CheckpointError(f"{reference.name} has {name} of shape {list(shape)}, the checkpoint {source} of shape {list(mine)}", hint=_OTHER_BASE)
    if absent := sorted(name for name, theirs_name in found.items() if theirs_name is None):
        raise CheckpointError(f"{source} has tensors that {reference.name} lacks: {listed(absent)}", hint=_OTHER_BASE)
    if layout.base:
        missing = sorted(name for name in theirs.entries if name not in wanted and not name.endswith("rotary_emb.inv_freq"))
        missing = [name for name in missing if name != _HEAD or _compare(layout.tensors, layout.base[_EMBEDDINGS], theirs, name) == "changed"]
        if missing:
            raise CheckpointError(f"{source} lacks tensors of {reference.name}: {listed(missing)}", hint="copy or download the checkpoint again")


def _differences(layout: AuthorsLayout, theirs: TensorFiles, progress: Progress) -> tuple[tuple[str, ...], dict[str, torch.dtype]]:
    """The base tensors with other numbers, and those that are the base's own rounded to the checkpoint's dtype."""
    total = sum(layout.tensors.entries[key].end - layout.tensors.entries[key].begin for key in layout.base.values())
    changed, rounded = [], {}
    with progress.task("comparing with the base model", total=total, unit="B") as task:
        for name, key in sorted(layout.base.items()):
            theirs_name = _name_in_base(theirs, name)
            assert theirs_name is not None
            found = _compare(layout.tensors, key, theirs, theirs_name, task)
            if found == "changed":
                changed.append(name)
            elif found == "rounded":
                rounded[name] = layout.tensors.entries[key].torch_dtype
    return tuple(changed), rounded


def _compare(mine: TensorFiles, key: str, theirs: TensorFiles, name: str, task: ProgressBar | None = None) -> Literal["equal", "rounded", "changed"]:
    """Whether the checkpoint's tensor is the base's, or the base's rounded to the checkpoint's dtype; a block at a time."""
    a, b = mine.entries[key], theirs.entries[name]
    numbers = CHUNK // 8
    found: Literal["equal", "rounded"] = "equal"
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
            found = "rounded"
    return found


def _probe(layout: AuthorsLayout, theirs: TensorFiles) -> list[float]:
    """What ``meteora_core.model.attach.probe_base`` takes from the loaded base model, read from its file."""
    paths = list(layout.modules)
    values: list[float] = []
    for path in paths[:: max(1, len(paths) // 16)][:16]:
        name = f"{path}.weight"
        count = prod(theirs.entries[name].shape)
        values += theirs.sample(name, range(0, count, max(1, count // 4))[:4])
    return values


def _check_numbers(layout: AuthorsLayout, infos: tuple[AdapterInfo, ...], kept: tuple[str, ...], progress: Progress) -> None:
    """Refuse gates, adapters and stored base tensors that hold NaN, infinity, or numbers whose use overflows. Raises CheckpointError."""
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
        "format": FORMAT,
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
