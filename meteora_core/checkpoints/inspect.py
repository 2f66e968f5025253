"""Identifies a file or folder: a native checkpoint, one in the authors' layout, a PEFT adapter, or a base model. No weights are loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meteora_core.adapters.config import CONFIG as ADAPTER_CONFIG
from meteora_core.adapters.config import WEIGHTS as ADAPTER_WEIGHTS
from meteora_core.adapters.config import AdapterConfig, find_adapter
from meteora_core.checkpoints.authors_layout import is_authors, read_layout
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native_config import BASE, CONFIG_FILE, WEIGHT_FILE, check_weights, read_config
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.file_models import read_model
from meteora_core.files import sha256
from meteora_core.json_files import read_object
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import check_regular, is_regular
from meteora_core.tensor_files import PICKLES, TensorEntry, TensorFiles, refuse_pickle

Facts = dict[str, Any]


def inspect_checkpoint(path: str | Path, *, hashes: bool = True, progress: Progress = SILENT) -> Facts:
    """Identify and describe ``path`` from its configurations and safetensors headers.

    Args:
        path: A folder or a safetensors file.
        hashes: Whether to compute the SHA-256 of each weight file, which reads the whole file.
        progress: The receiver of progress reports on the hashing.

    Returns:
        A JSON-able dict with ``kind`` ("native", "authors", "adapter", "adapters", "base" or "unknown"), ``path``, ``files`` (name, bytes, sha256),
        ``parameters`` (counts by part and "total"), ``dtypes`` (number of elements by dtype), and, depending on the kind, ``base``, ``adapters`` (name,
        rank, alpha, rslora, sha256, source), ``adapter_count``, ``ranks``, ``layers``, ``top_k``, ``temperature`` and ``intact`` (whether the
        weight file is the one that was saved; None without ``hashes`` or without a recorded hash).

    Raises:
        CheckpointError: The path does not exist, or a file is broken, cut short or a pickle.
    """
    path = checkpoint_folder(path, progress=progress)
    refuse_pickle(path)
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{str(path)!r} cannot be read: {broken}", hint="correct the path") from broken
    if not exists:
        raise CheckpointError(f"no such file or folder: {path}", hint="correct the path")
    if not folder:
        check_regular(path, CheckpointError, hint="correct the path")
        if path.name == CONFIG_FILE or (path.name == WEIGHT_FILE and is_regular(path.parent / CONFIG_FILE)):
            path = path.parent
        elif path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            return _unknown(path)
    if path.is_dir():
        if os.path.lexists(path / CONFIG_FILE):
            return _native(path, hashes, progress)
        if os.path.lexists(path / ADAPTER_CONFIG):
            return _adapter(path, hashes, progress)
        if not any(path.glob("*.safetensors")):
            if os.path.lexists(path / "default" / ADAPTER_CONFIG):
                return _adapter(path / "default", hashes, progress)
            if any(find_adapter(entry) for entry in path.iterdir() if entry.is_dir()):
                return _adapters(path, hashes, progress)
        if not any(path.glob("*.safetensors")):
            return _unknown(path)
    tensors = TensorFiles(path)
    if is_authors(list(tensors.entries)):
        return _authors(path, tensors, hashes, progress)
    if any(".lora_A." in name for name in tensors.entries):
        facts = _facts("adapter", path, tensors, hashes, progress)
        return {**facts, "parameters": _count(tensors.entries.items(), lambda name: "adapters"), **_lora_facts(tensors)}
    config = _model_config(path if path.is_dir() else path.parent)
    if config is None:
        return _facts("unknown", path, tensors, hashes, progress)
    return {**_facts("base", path, tensors, hashes, progress), "parameters": _count(tensors.entries.items(), lambda name: "base"), "base": config}


def _native(folder: Path, hashes: bool, progress: Progress) -> Facts:
    config = read_config(folder)
    check_weights(folder, config)
    tensors = TensorFiles(folder / WEIGHT_FILE)

    def part(name: str) -> str:
        return "base" if name.startswith(BASE) else "gates" if name.endswith(".gate") else "adapters"

    facts = _facts("native", folder, tensors, hashes, progress)
    recorded = config.get("weights_sha256")
    return {
        **facts,
        "parameters": _count(tensors.entries.items(), part),
        "intact": facts["files"][0]["sha256"] == recorded if hashes and recorded else None,
        "format": config["format"],
        "features": config.get("features", []),
        "base": {"name": config["base"].get("name"), "revision": config["base"].get("revision")},
        "contains": config.get("contains", ["gates"]),
        "gates": config.get("gates"),
        "base_tensors": config.get("base_tensors", []),
        "top_k": config["top_k"],
        "temperature": config["temperature"],
        "frame": config.get("frame"),
        "layers": len(config["modules"]),
        "targets": _targets(config["modules"]),
        "adapter_count": len(config["adapters"]),
        "ranks": sorted({rank for module in config["modules"].values() for rank in module["ranks"]}),
        "adapters": [
            {key: adapter.get(key) for key in ("name", "rank", "alpha", "rslora", "source", "frame")} | {"sha256": adapter.get("sha256") or None}
            for adapter in config["adapters"]
        ],
        "training": config.get("training") or {},
    }


def _authors(path: Path, tensors: TensorFiles, hashes: bool, progress: Progress) -> Facts:
    layout = read_layout(path)

    def part(name: str) -> str:
        return "gates" if ".moe_gate." in name else "adapters" if ".lora_A." in name or ".lora_B." in name else "base"

    return {
        **_facts("authors", path, tensors, hashes, progress),
        "parameters": _count(tensors.entries.items(), part),
        "base": {"tensors": len(layout.base)},
        "layers": len(layout.modules),
        "targets": _targets(layout.modules),
        "adapter_count": layout.count,
        "ranks": [layout.rank],
    }


def _adapter(folder: Path, hashes: bool, progress: Progress) -> Facts:
    config = read_model(folder / ADAPTER_CONFIG, AdapterConfig, error=AdapterError)
    if not is_regular(folder / ADAPTER_WEIGHTS):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        what = f"only {pickled[0]}, a pickle file, which is never read" if pickled else f"no {ADAPTER_WEIGHTS}"
        raise CheckpointError(f"the adapter {folder} holds {what}", hint="save it again as safetensors with a recent PEFT")
    tensors = TensorFiles(folder / ADAPTER_WEIGHTS)
    facts = _facts("adapter", folder, tensors, hashes, progress)
    described = {
        "name": folder.name,
        "method": config.peft_type,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "sha256": facts["files"][0]["sha256"],
        "source": str(folder),
    }
    return {
        **facts,
        "parameters": _count(tensors.entries.items(), lambda name: "adapters"),
        "base": {"name": config.base_model_name_or_path, "revision": (config.model_extra or {}).get("revision")},
        **_lora_facts(tensors),
        "adapters": [described],
    }


def _adapters(folder: Path, hashes: bool, progress: Progress) -> Facts:
    """Describe a folder of PEFT folders."""
    adapter_folders = {
        path.name: adapter_folder for path in folder.iterdir() if not path.name.startswith(".") and (adapter_folder := find_adapter(path)) is not None
    }
    single = [_named(_adapter(adapter_folders[name], hashes, progress), name) for name in sorted(adapter_folders)]
    parameters = sum(facts["parameters"]["total"] for facts in single)
    dtypes: Counter[str] = Counter()
    for facts in single:
        dtypes.update(facts["dtypes"])
    return {
        "kind": "adapters",
        "path": str(folder),
        "files": [{**file, "name": f"{facts['adapters'][0]['name']}/{file['name']}"} for facts in single for file in facts["files"]],
        "bytes": sum(facts["bytes"] for facts in single),
        "dtypes": dict(dtypes),
        "parameters": {"adapters": parameters, "total": parameters},
        "bases": sorted({str(facts["base"]["name"]) for facts in single}),
        "adapter_count": len(single),
        "ranks": sorted({rank for facts in single for rank in facts["ranks"]}),
        "adapters": [facts["adapters"][0] for facts in single],
    }


def _named(facts: Facts, name: str) -> Facts:
    """Return the facts of one adapter, with the name of its folder as its name."""
    facts["adapters"][0]["name"] = name
    return facts


def _unknown(path: Path) -> Facts:
    files = [path] if is_regular(path) else sorted(file for file in path.iterdir() if is_regular(file))
    pickled = [file.name for file in files if file.suffix in PICKLES]
    facts: Facts = {"kind": "unknown", "path": str(path), "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": None} for file in files]}
    if pickled:
        facts["refused"] = pickled
    return facts


def _facts(kind: str, path: Path, tensors: TensorFiles, hashes: bool, progress: Progress) -> Facts:
    files = []
    total = sum(file.stat().st_size for file in tensors.files)
    with progress.task(f"hashing {path.name}", total=total, unit="B") as task:
        for file in tensors.files:
            size = file.stat().st_size
            files.append({"name": file.name, "bytes": size, "sha256": sha256(file) if hashes else None})
            task.update(size)
    dtypes: Counter[str] = Counter()
    for entry in tensors.entries.values():
        dtypes[entry.dtype] += entry.count
    return {
        "kind": kind,
        "path": str(path),
        "files": files,
        "bytes": total,
        "tensors": len(tensors.entries),
        "dtypes": dict(dtypes),
        "parameters": _count(tensors.entries.items(), lambda name: "other"),
    }


def _count(entries: Iterable[tuple[str, TensorEntry]], part: Any) -> dict[str, int]:
    counts = Counter({"total": 0})
    for name, entry in entries:
        counts[part(name)] += entry.count
        counts["total"] += entry.count
    return dict(counts)


def _targets(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _lora_facts(tensors: TensorFiles) -> Facts:
    sides = {name.partition(".lora_A.")[0].removeprefix("base_model.model."): entry for name, entry in tensors.entries.items() if ".lora_A." in name}
    return {
        "adapter_count": 1,
        "layers": len(sides),
        "targets": _targets(sides),
        "ranks": sorted({entry.shape[0] for entry in sides.values() if entry.shape}),
    }


def _model_config(folder: Path) -> Facts | None:
    """Return the description of a base model in its config.json; None if there is no such file."""
    if not is_regular(folder / "config.json"):
        return None
    config = read_object(folder / "config.json", nullable="*", error=CheckpointError)
    if "model_type" not in config:
        return None
    names = ("model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    source = folder / "meteora_source.json"
    described = {name: config[name] for name in names if name in config}
    return {**described, "source": read_object(source, error=CheckpointError)} if is_regular(source) else described
