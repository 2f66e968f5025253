"""The starter checkpoint: trained adapters and gates in the folder ``checkpoint/`` of this package, if the installation includes them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from meteora_core.checkpoints.native import CONFIG_FILE

MAX_BYTES = 25_000_000
"""Maximum size of the checkpoint's folder in bytes."""


def starter_checkpoint() -> Path | None:
    """Folder of the starter checkpoint; None if this installation does not include it."""
    folder = Path(str(files(__name__))) / "checkpoint"
    return folder if (folder / CONFIG_FILE).is_file() else None


def default_checkpoint(*folders: Path) -> Path:
    """The first of ``folders`` that exists; otherwise the starter checkpoint, or the last of ``folders`` if there is none."""
    existing = next((folder for folder in folders if folder.is_dir()), None)
    return existing or starter_checkpoint() or folders[-1]


def usual_checkpoint(runs: Path) -> Path:
    """The checkpoint to use if none is named: that of `meteora train` in ``runs``, or the quickstart's in ``runs``, or the starter checkpoint."""
    trained = runs / "meteora"
    return default_checkpoint(trained, runs / "quickstart" / "meteora", trained)
