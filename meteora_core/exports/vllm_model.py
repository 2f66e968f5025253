"""Writes a checkpoint with its base model as a folder that ``vllm serve`` accepts without further options (:mod:`meteora_core.integrations.vllm`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank, natural_order
from meteora_core.checkpoints.native import BASE, read_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.parts import write_files
from meteora_core.errors import CheckpointError
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.fetch.hub import HubOptions, download_repo
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.json_files import read_object, write_json
from meteora_core.model.attach import same_base
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.tensor_files import TensorFiles, TensorPlan, dtype_name, tensor_bytes, write_tensors
from meteora_core.text import listed

INSIDE = "meteora"
"""The folder of gates and adapters, inside the model's folder."""
METHOD = "meteora"
"""The name of the quantisation method in the model's configuration, by which vLLM finds the plugin."""
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".py")
"""Suffixes of files in a base model's folder that are not needed or not safe."""


def export_vllm(checkpoint: str | Path, folder: str | Path, options: ExportOptions = ExportOptions()) -> Exported:
    """Write a checkpoint and its base model as one folder for vLLM.

    The base model's files are hard links if the file system supports them, and copies otherwise. Shards that contain base tensors changed by the checkpoint
    are rewritten. Gates and adapters are in ``meteora/``, with the hash of their file.

    Args:
        checkpoint: A native checkpoint.
        folder: The folder to write.
        options: The options of the export.

    Raises:
        UsageError: The folder exists, or the base model is not found.
        CheckpointError: The checkpoint is broken, its gates are untrained, the base model is not the one that it was trained on, or vLLM cannot serve its
            adapters: those with DoRA, biases, experts or an output layer.
        StorageError: The folder cannot be written.

    Example:
        >>> from meteora_core.exports.vllm_model import export_vllm
        >>> done = export_vllm("runs/mine", "served")  # doctest: +SKIP
        >>> sorted(path.name for path in done.folder.iterdir())  # doctest: +SKIP
        ['config.json', 'meteora', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    folder = Path(folder)
    check_export(checkpoint, folder, overwrite=options.overwrite)
    refuse_untrained(checkpoint, read_config(checkpoint))
    config, tensors, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
    _check_servable(bank)
    base = _base_folder(options, config)
    described = read_object(base / "config.json", error=CheckpointError)
    files = TensorFiles(base)
    _check_base(config, files, base)
    if (described.get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
        raise CheckpointError(
            f"the base model in {base} is quantised by bitsandbytes, which vLLM loads in a way of its own", hint="pass --base with the unquantised model"
        )
    changed = _changes(config, tensors, files, base)
    with atomic_folder(folder) as temporary, storage_errors(folder):
        with options.progress.task("writing the base model", total=len(files.files), unit="files") as bar:
            for file in sorted(path for path in base.iterdir() if path.is_file()):
                if file.name == "config.json" or file.suffix in _LEFT_OUT or file.name.endswith(".bin.index.json"):
                    continue
                mine = {name: tensor for name, tensor in changed.items() if files.entries[name].file.name == file.name} if file in files.files else {}
                if mine:
                    _rewrite(file, temporary / file.name, files, mine)
                else:
                    link_or_copy(file, temporary / file.name)
                bar.update(int(file in files.files))
        write_json(temporary / "config.json", {**described, "quantization_config": quantization(described)})
        (temporary / INSIDE).mkdir()
        write_files(temporary / INSIDE, embedded(config, bank), adapter_tensors(tensors, bank))
    return Exported.of_folder(folder, "vllm", f"{len(bank.names)} adapters")


def quantization(described: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` by which vLLM finds the plugin. That of a quantised base model is its entry ``base``.

    Example:
        >>> quantization({})
        {'quant_method': 'meteora', 'checkpoint': 'meteora'}
    """
    found = described.get("quantization_config")
    return {"quant_method": METHOD, "checkpoint": INSIDE, **({"base": found} if found else {})}


def embedded(config: Mapping[str, Any], bank: AdapterBank) -> dict[str, Any]:
    """The configuration of the checkpoint with its adapters embedded and without base tensors, which are in the base model's files."""
    adapters = [{**info.to_json(), "sha256": ""} for info in bank.adapters]
    rest = {key: value for key, value in config.items() if key not in ("weights_sha256", "base_rounded")}
    modules = {
        path: {**config["modules"][path], "ranks": list(stack.ranks), "scaling": [float(value) for value in stack.scaling]}
        for path, stack in bank.modules.items()
    }
    return {**rest, "adapters": adapters, "contains": ["gates", "adapters"], "base_tensors": [], "modules": modules}


def adapter_tensors(tensors: Mapping[str, Tensor], bank: AdapterBank) -> dict[str, Tensor]:
    """Gates, A and B of every layer, by their names in a checkpoint's weight file."""
    found = {f"{path}.gate": tensors[f"{path}.gate"] for path in bank.modules}
    for path, stack in bank.modules.items():
        found |= {f"{path}.lora_A": stack.A.contiguous(), f"{path}.lora_B": stack.B.contiguous()}
    return found


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy of it on another file system."""
    source = source.resolve()  # files of the hub's cache are symbolic links
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _base_folder(options: ExportOptions, config: Mapping[str, Any]) -> Path:
    reference = BaseReference(options.base) if options.base else BaseReference(config["base"]["name"], config["base"].get("revision"))
    found = Path(locate_base(reference, progress=options.progress))
    if found.is_dir():
        return found
    return download_repo(str(found), HubOptions(reference.revision), progress=options.progress).path


def _check_servable(bank: AdapterBank) -> None:
    """Raise CheckpointError if a layer's adapters consist of more than A and B, or if the layer is not an ordinary linear layer."""
    for path, stack in bank.modules.items():
        what = None
        if stack.experts > 1:
            what = "experts of a mixture"
        elif stack.scale is not None or stack.shift is not None or stack.pending:
            what = "DoRA, a trained bias or a whole layer"
        elif path.rpartition(".")[2] == "lm_head":
            what = "the output layer"
        if what is not None:
            raise CheckpointError(f"the adapters of {path} cannot be served by vLLM: they include {what}", hint="serve this checkpoint with `meteora chat`")


def _check_base(config: Mapping[str, Any], files: TensorFiles, base: Path) -> None:
    """Raise CheckpointError if the base model lacks a layer, or if its weights are not those that the checkpoint was trained on."""
    paths = sorted(config["modules"], key=natural_order)
    names = [f"{path}.weight" for path in paths]
    quantised = [name for name in names if name not in files.entries or not files.entries[name].torch_dtype.is_floating_point]
    values: list[float] | None = []
    for name in names[:: max(1, len(names) // 16)][:16]:
        if values is None or name in quantised or files.entries[name].torch_dtype.itemsize < 2:
            values = None  # a quantised base; its own configuration says which layers are
            continue
        count = prod(files.entries[name].shape)
        values += files.sample(name, range(0, count, max(1, count // 4))[:4])
    if not same_base(values, config["base"].get("probe")):
        raise CheckpointError(f"the weights in {base} are not those that the checkpoint was trained on", hint="pass --base with the right model")


def _changes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: TensorFiles, base: Path) -> dict[str, Tensor]:
    """The tensors that replace those of the base model, by name, in the dtype of its files: those in the checkpoint, and base tensors that it rounds."""
    changed = {name: tensors[BASE + name] for name in config.get("base_tensors", [])}
    if missing := sorted(changed.keys() - files.entries.keys()):
        raise CheckpointError(
            f"the base model in {base} has no tensors {listed(missing)}, which the checkpoint changes", hint="pass --base with the right model"
        )
    for rounded, names in (config.get("base_rounded") or {}).items():
        changed |= {name: files.read(name).to(getattr(torch, rounded)) for name in names if name in files.entries and name not in changed}
    for name, tensor in changed.items():
        entry = files.entries[name]
        if tuple(tensor.shape) != tuple(entry.shape) or not entry.torch_dtype.is_floating_point:
            raise CheckpointError(f"{name} of the base model in {base} cannot be replaced: it has another shape or is quantised", hint="pass --base")
        changed[name] = tensor.to(entry.torch_dtype)
    return changed


def _rewrite(source: Path, target: Path, files: TensorFiles, changed: Mapping[str, Tensor]) -> None:
    """Write one shard of the base model with new values of some tensors."""

    def blocks(name: str) -> Iterable[bytes]:
        return [tensor_bytes(changed[name])] if name in changed else files.chunks(name)

    entries = {name: entry for name, entry in files.entries.items() if entry.file.name == source.name}
    plans = [TensorPlan(name, dtype_name(entry.torch_dtype), tuple(entry.shape), partial(blocks, name)) for name, entry in entries.items()]
    write_tensors(target, plans, {"format": "pt"})
