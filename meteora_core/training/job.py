"""What every training run is given: base model, folders, and the processes that run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meteora_core.model.base import BaseReference
from meteora_core.progress import SILENT, Progress
from meteora_core.training.distributed import SINGLE, Runtime


@dataclass(frozen=True)
class TrainJob:
    """Where a run reads and writes, and how it runs. It is made once and handed to everything that trains.

    Attributes:
        base: The base model, as adapters and checkpoints will name it.
        data_dir: The folder of all datasets.
        out: For adapters the folder that holds one folder per adapter; for gates the checkpoint's folder.
        max_rows: Number of train rows of each task to use, from the first on; None uses all.
        token_cache: Folder in which tokenised rows are kept and from which they are read; None keeps them in memory.
        resume: Continue from a saved state of the same inputs, if there is one.
        force: Train even if the same result is there.
        runtime: The processes that train together. Each of them calls the training function; the main one writes.
        progress: Where progress is reported.
        template: What stands around a message when nobody says otherwise, for gates: "chat", "inst", "raw" or a text with ``{}``; None chooses it.

    Example:
        >>> TrainJob(BaseReference("smollm2-135m"), Path("datasets"), Path("adapters"), max_rows=100).resume
        False
    """

    base: BaseReference
    data_dir: Path
    out: Path
    max_rows: int | None = None
    token_cache: Path | None = None
    resume: bool = False
    force: bool = False
    runtime: Runtime = SINGLE
    progress: Progress = SILENT
    template: str | None = None
