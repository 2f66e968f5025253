"""What an evaluation's rows depend on, in few words: rows of a stopped run count only where all of it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.peft_folder import CONFIG, WEIGHTS, find_adapter
from meteora_core.fetch.base_models import CATALOG
from meteora_core.files import sha256

if TYPE_CHECKING:
    from meteora_core.model.base import BaseReference

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Of a base folder, hashed whole: they decide how prompts are read and where answers end."""


def base_files(reference: BaseReference) -> dict[str, Any] | None:
    """What tells one state of a local base folder from another: its small files' SHA-256, and size and time of its weights, which are too large to read.

    Args:
        reference: The base; a catalog model or one of a hub is known by its name and revision.

    Returns:
        File name -> SHA-256, or [size in bytes, time of the last change in ns]; None when the base is no local folder.
    """
    folder = Path(reference.name)
    if reference.name in CATALOG or not folder.is_dir():
        return None
    made: dict[str, Any] = {name: sha256(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    for file in sorted(folder.glob("*.safetensors")):
        facts = file.stat()
        made[file.name] = [facts.st_size, facts.st_mtime_ns]
    return made


def adapter_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of an adapter's weights and of its configuration, which holds its scaling."""
    place = find_adapter(folder) or folder
    return {name: sha256(place / name) for name in (WEIGHTS, CONFIG)}
