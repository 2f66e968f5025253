"""The parameters that all training runs share (base model, folders, processes), and the figures that all of them report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meteora_core.model.base import BaseReference
from meteora_core.progress import SILENT, Progress
from meteora_core.training.distributed import SINGLE, Runtime


@dataclass(frozen=True)
class TrainJob:
    """Folders, processes and progress of a training run.

    Attributes:
        base: The base model; adapters and checkpoints record its name and revision.
        data_dir: The folder of all datasets.
        out: For adapters, the folder that holds one folder per adapter; for gates, the checkpoint's folder.
        max_rows: Number of train rows of each task to use, from the first on; None uses all.
        token_cache: Folder of the cache of tokenised rows; None keeps them in memory.
        resume: Whether to continue from a saved state of the same inputs, if there is one.
        force: Whether to train even if a result with the same inputs exists.
        runtime: The processes that train together. Each of them calls the training function; the main process writes the files.
        progress: Object that progress is reported to.
        template: Default prompt template of the checkpoint, for gates: "chat", "inst", "raw" or a text with ``{}``; None chooses it automatically.

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


@dataclass(frozen=True)
class Trained:
    """The result of a training run.

    Attributes:
        folder: The folder that was written: a checkpoint, or a PEFT folder.
        skipped: Whether the folder already held what the same inputs give.
        steps: Number of optimiser steps.
        loss: The last logged loss; NaN if nothing was logged.
        tokens: Number of tokens that were trained on.
        seconds: Duration of the training.
        cut: Number of rows that were cut to the longest length.

    Example:
        >>> Trained(Path("adapters/gsm8k"), skipped=False, steps=100, loss=0.5, tokens=40_000, seconds=61.0, cut=0).steps
        100
    """

    folder: Path
    skipped: bool
    steps: int
    loss: float
    tokens: int
    seconds: float
    cut: int
