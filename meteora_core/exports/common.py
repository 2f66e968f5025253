"""Options, results and checks that all exports have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meteora_core.checkpoints.native_config import CONFIG_FILE
from meteora_core.errors import UsageError
from meteora_core.progress import SILENT, Progress


@dataclass(frozen=True)
class ExportOptions:
    """Options that all exports have in common.

    Attributes:
        base: The base model, a folder, a known name or a hub id; None means the one that the checkpoint names.
        adapters_dir: The folder that contains the adapter folders by name, if they were moved after training.
        overwrite: Whether to replace an existing folder.
        progress: The receiver of progress reports.
    """

    base: str | None = None
    adapters_dir: str | Path | None = None
    overwrite: bool = False
    progress: Progress = SILENT


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: The folder that was written.
        kind: The format: "peft", "merged", "gguf" or "vllm".
        adapter: The name of the exported adapter, or the number of adapters.
        files: The names of the files, sorted.
        size: The total size of the files in bytes.
    """

    folder: Path
    kind: str
    adapter: str
    files: tuple[str, ...]
    size: int

    @classmethod
    def of_folder(cls, folder: Path, kind: str, adapter: str) -> Exported:
        """Return the result for a folder that was written."""
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return cls(folder, kind, adapter, tuple(file.name for file in files), sum(file.stat().st_size for file in files))


def check_export(checkpoint: str | Path, folder: str | Path, *, overwrite: bool) -> None:
    """Check the source and the target of an export before anything is read.

    Raises:
        UsageError: The checkpoint is in the authors' layout, or the folder exists and ``overwrite`` is False, or it is the checkpoint itself.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if folder.exists() and checkpoint.exists() and folder.resolve() == checkpoint.resolve():
        raise UsageError(f"{folder} is the checkpoint itself", hint="choose another folder")
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists already", hint="pass --force to replace it, or choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint="choose a folder")
    if (checkpoint.is_file() or (checkpoint / "model.safetensors").is_file()) and not (checkpoint / CONFIG_FILE).is_file():
        raise UsageError(
            f"{checkpoint} is not a native checkpoint, so nothing can be exported from it",
            hint="`meteora ckpt inspect` says what it is; `meteora ckpt convert` converts the authors' layout",
        )
