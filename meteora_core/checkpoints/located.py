"""Checkpoints that are named by their id on the hub."""

from __future__ import annotations

from pathlib import Path

from meteora_core.checkpoints.native_config import CONFIG_FILE, WEIGHT_FILE
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.fetch.hub_names import ADAPTER_FILES, fetched, hub_name
from meteora_core.progress import SILENT, Progress

FILES = (CONFIG_FILE, WEIGHT_FILE, "config.json", *(f"adapters/{pattern}" for pattern in ADAPTER_FILES))
"""Patterns of the files that loading a checkpoint reads."""


def checkpoint_folder(checkpoint: str | Path, *, progress: Progress = SILENT) -> Path:
    """The folder of a checkpoint, which is fetched into the hub's cache first if it is named by its id on the hub.

    Args:
        checkpoint: A folder or file; or ``user/name``, ``user/name@revision`` or ``hf://user/name``.
        progress: The receiver of progress reports.

    Returns:
        The folder or file. A path that does not exist is returned as it is.

    Raises:
        CheckpointError: The repository holds no checkpoint.
        DownloadError: The repository cannot be fetched.
    """
    name = hub_name(checkpoint)
    if name is None:
        return Path(checkpoint)
    got = fetched(name, FILES, progress=progress)
    folder = got.path / name.folder
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{name.uri} is not a meteora checkpoint: it holds no {CONFIG_FILE}",
            hint=f"`meteora ckpt download {name.repository}` fetches a repository of another kind",
        )
    return folder


def refuse_hub(checkpoint: str | Path) -> None:
    """Raise UsageError for a checkpoint on the hub, for commands that change a checkpoint."""
    name = hub_name(checkpoint)
    if name is not None:
        revision = f"@{name.revision}" if name.revision else ""
        raise UsageError(
            f"{checkpoint} is on the hub, and only a folder can be changed",
            hint=f"fetch it first: meteora ckpt download {name.repository}{revision} --to runs/{name.repository.rpartition('/')[2]}",
        )
