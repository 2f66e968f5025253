"""The starter checkpoint: trained adapters and gates that come with the package, where it ships them (``checkpoint/`` in this folder)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from meteora_core.checkpoints.native import CONFIG_FILE

MAX_BYTES = 25_000_000
"""The checkpoint's folder is no larger."""


def starter_checkpoint() -> Path | None:
    """The folder of the checkpoint that came with this installation; None when it came without one."""
    folder = Path(str(files(__name__))) / "checkpoint"
    return folder if (folder / CONFIG_FILE).is_file() else None


def default_checkpoint(*places: Path) -> Path:
    """The first of ``places`` that is there; else the starter checkpoint; else the last of ``places``."""
    found = next((place for place in places if place.is_dir()), None)
    return found or starter_checkpoint() or places[-1]


def usual_checkpoint(runs: Path) -> Path:
    """What is used where no checkpoint is named: what `meteora train` left in ``runs``, else the quickstart's checkpoint there, else the starter."""
    own = runs / "meteora"
    return default_checkpoint(own, runs / "quickstart" / "meteora", own)
