"""Decides whether two names refer to the same base model: hub ids, local copies, paths in the hub's cache, and quantised copies."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from meteora_core.errors import MeteoraError
from meteora_core.json_files import read_json
from meteora_core.reading import is_regular
from meteora_core.tensor_files import TensorFiles

_CACHED = re.compile(r"(?:^|/)models--(?:[^/]+?--)?(?P<name>[^/]+?)(?:/snapshots(?:/[^/]*)?)?$")
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-[48]bit$")
_TENSORS = 16


def short_name(base: str) -> str:
    """Return a name without owner, folder, path in the hub's cache, letter case and the suffix of a quantised copy.

    ``meta-llama/Llama-3.1-8B``, ``/cache/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f`` and ``unsloth/Meta-Llama-3.1-8B-bnb-4bit`` are all
    ``llama-3.1-8b``.
    """
    path = base.strip().replace("\\", "/").rstrip("/")
    cached = _CACHED.search(path)
    name = cached["name"] if cached else path.rpartition("/")[2]
    name = _QUANTISED.sub("", name.lower())
    return name.removeprefix("meta-") if name.startswith("meta-llama-") else name


def same_base_name(one: str, other: str) -> bool:
    """Whether two names refer to the same base model.

    Compares :func:`short_name`, the origin that the configuration of a local copy states, and a few weights if both models are stored locally.
    """
    return bool(_names(one) & _names(other)) or _same_weights(one, other)


def _names(base: str) -> set[str]:
    names = {short_name(base)}
    folder = _folder(base)
    if folder is not None and is_regular(folder / "config.json"):
        try:
            config = read_json(folder / "config.json")
        except MeteoraError:
            return names
        origin = config.get("_name_or_path") if isinstance(config, dict) else None
        if isinstance(origin, str) and origin:
            names.add(short_name(origin))
    return names - {""}


def _folder(base: str) -> Path | None:
    """Return the local folder of a base model, if any: a folder, a model of the catalog, or an entry of the hub's cache."""
    from meteora_core.fetch.base_models import is_ready, model_folder
    from meteora_core.fetch.catalog import CATALOG

    if base in CATALOG:
        return model_folder(base) if is_ready(base) else None
    try:
        if Path(base).is_dir():
            return Path(base)
    except (OSError, ValueError):
        return None
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached_file = try_to_load_from_cache(base, "config.json")
    except HFValidationError:
        return None
    return Path(cached_file).parent if isinstance(cached_file, str) else None


@cache
def _same_weights(one: str, other: str) -> bool:
    """Whether both models are stored locally and have equal tensors, judged by a few elements of some of them."""
    folders = (_folder(one), _folder(other))
    if folders[0] is None or folders[1] is None:
        return False
    try:
        mine, theirs = TensorFiles(folders[0]), TensorFiles(folders[1])
        names = [name for name, entry in sorted(mine.entries.items()) if len(entry.shape) == 2]
        if not names or any(name not in theirs or theirs.entries[name].shape != mine.entries[name].shape for name in names):
            return False
        for name in names[:: max(1, len(names) // _TENSORS)]:
            count = mine.entries[name].count
            positions = range(0, count, max(1, count // 8))
            if any(abs(a - b) > 1e-2 * max(abs(a), abs(b)) + 1e-6 for a, b in zip(mine.sample(name, positions), theirs.sample(name, positions), strict=True)):
                return False
    except MeteoraError:
        return False
    return True
