"""Training curves, written to TensorBoard, Weights & Biases or MLflow through accelerate's trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meteora_core.choices import LogTo
from meteora_core.errors import MeteoraError, UsageError
from meteora_core.files import storage_errors

PROJECT = "meteora"
"""The project of Weights & Biases, and the experiment of MLflow, in which runs are listed."""

_EXTRAS = ("wandb", "mlflow")
"""Trackers whose package is installed by an extra of the same name."""


@dataclass(frozen=True)
class CurvesOf:
    """The run whose curves are written.

    Attributes:
        title: Name of the run.
        folder: Folder of TensorBoard's event files; None writes none.
        inputs: Inputs that determine the run; they are shown as the run's configuration.
        first_step: Step that the run continues after; later steps of an interrupted run are dropped from TensorBoard's curves.
    """

    title: str
    folder: Path | None
    inputs: Mapping[str, Any]
    first_step: int = 0


class Curves:
    """Writes numbers by step to one of accelerate's trackers, or to none.

    Args:
        tracker: A started tracker of accelerate; None writes nothing.
        destination: Name of the tracker's destination in error messages.
    """

    def __init__(self, tracker: Any = None, destination: Path = Path("curves")) -> None:
        self._tracker, self._destination = tracker, destination

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step, except those that are not finite. Raises StorageError if they cannot be written."""
        numbers = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._tracker is not None and numbers:
            with storage_errors(self._destination):
                self._tracker.log(numbers, step=step)

    def close(self) -> None:
        """Write the remaining values, and end the run."""
        if self._tracker is not None:
            with storage_errors(self._destination):
                self._tracker.finish()
            self._tracker = None


def open_curves(kind: LogTo, run: CurvesOf) -> Curves:
    """Open the tracker that the settings name.

    Args:
        kind: "none", "tensorboard" (nothing is written if it is not installed), "wandb" or "mlflow".
        run: Title, folder and configuration of the run.

    Raises:
        UsageError: The package of the tracker is not installed.
        MeteoraError: The tracker cannot be started, for example because its server cannot be reached.
        StorageError: TensorBoard's folder cannot be written.
    """
    if kind == "tensorboard":
        return Curves() if run.folder is None or find_spec("tensorboard") is None else _tensorboard(run, run.folder)
    if kind == "none":
        return Curves()
    check_tracker(kind)
    _started_state()
    from accelerate.tracking import MLflowTracker, WandBTracker

    try:
        tracker = WandBTracker(PROJECT, name=run.title) if kind == "wandb" else MLflowTracker(PROJECT, run_name=run.title)
        tracker.start()
        tracker.store_init_configuration(flat(run.inputs))
    except Exception as failed:
        reason = str(failed).strip().partition("\n")[0] or type(failed).__name__
        raise MeteoraError(f"{kind} could not be started: {reason}", hint="log in or correct its settings, or pass --log-to none") from failed
    return Curves(tracker, Path(kind))


def _tensorboard(run: CurvesOf, folder: Path) -> Curves:
    _started_state()
    from accelerate.tracking import TensorBoardTracker

    with storage_errors(folder):
        tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=run.first_step)
        tracker.start()
    return Curves(tracker, folder)


def _started_state() -> None:
    """Initialise accelerate's process state, which its trackers need; a run without a launcher has not initialised it."""
    from accelerate import PartialState

    PartialState()


def check_tracker(kind: LogTo) -> None:
    """Raise UsageError if the package of a tracker is not installed."""
    if kind in _EXTRAS and find_spec(kind) is None:
        raise UsageError(f'log_to = "{kind}", and {kind} is not installed', hint=f"pip install 'meteora-lora[{kind}]', or pass --log-to tensorboard")


def flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Flatten the nested inputs of a run, with dots in the names; values that are neither numbers nor text are converted to text.

    Example:
        >>> flat({"stage": "gates", "settings": {"beta": 50.0}})
        {'stage': 'gates', 'settings.beta': 50.0}
    """
    flattened: dict[str, str | int | float | bool] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flattened
