"""Where training curves go besides the checkpoint: TensorBoard or wandb."""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from meteora_core.errors import UsageError
from meteora_core.files import storage_errors


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of one step."""

    def close(self) -> None:
        """Write what is left."""


class _Nothing:
    def log(self, step: int, values: dict[str, float]) -> None:
        return None

    def close(self) -> None:
        return None


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with storage_errors(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        with storage_errors(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with storage_errors(self.folder):
            self.writer.close()


class _Wandb:
    def __init__(self, title: str, inputs: dict[str, Any]) -> None:
        self.run = import_module("wandb").init(project="meteora", name=title, config=inputs)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def open_tracker(kind: str, folder: Path | None, title: str, inputs: dict[str, Any], first_step: int) -> Tracker:
    """Open the tracker that the settings name.

    Args:
        kind: "none", "tensorboard" (nothing where it is not installed) or "wandb".
        folder: For TensorBoard's event files; None: nothing is written.
        title: The run's name.
        inputs: What fixes the run.
        first_step: Later steps of an earlier, interrupted part of the run are dropped.

    Raises:
        UsageError: wandb is asked for and not installed.
    """
    if kind == "wandb":
        if find_spec("wandb") is None:
            raise UsageError('log_to = "wandb", and wandb is not installed', hint="pip install wandb, or log to tensorboard")
        return _Wandb(title, inputs)
    if kind == "tensorboard" and folder is not None and find_spec("tensorboard") is not None:
        return _TensorBoard(folder, first_step)
    return _Nothing()


def finite(values: dict[str, float]) -> dict[str, float]:
    """The values that are numbers."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
