"""Fingerprints of the files that the answers of an evaluation depend on. Rows of an interrupted run are reused only if these are unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.peft_folder import CONFIG, WEIGHTS, find_adapter
from meteora_core.fetch.catalog import CATALOG
from meteora_core.files import sha256

if TYPE_CHECKING:
    from meteora_core.model.base import BaseReference

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of a base model's folder that are hashed, because they determine how prompts are tokenised and where answers end."""


def base_files(reference: BaseReference) -> dict[str, Any] | None:
    """Fingerprint of a local base model: the SHA-256 of its small files, and the size and time of its weight files, which are too large to hash.

    Args:
        reference: Base model. A model from the catalogue or a hub is identified by its name and revision instead.

    Returns:
        For each file name the SHA-256, or [size in bytes, time of the last change in ns]; None if the base model is not a local folder.
    """
    folder = Path(reference.name)
    if reference.name in CATALOG or not folder.is_dir():
        return None
    files: dict[str, Any] = {name: sha256(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    for file in sorted(folder.glob("*.safetensors")):
        status = file.stat()
        files[file.name] = [status.st_size, status.st_mtime_ns]
    return files


def adapter_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of an adapter's weights and of its configuration, which determines its scaling."""
    location = find_adapter(folder) or folder
    return {name: sha256(location / name) for name in (WEIGHTS, CONFIG)}
