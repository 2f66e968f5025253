"""The saved state of a run, as safetensors and JSON: parameters, AdamW's moments, the best weights so far, the step, the log.

The states of random generators are not saved, because every step sets their seed (:mod:`meteora_core.training.loop`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from meteora_core.errors import CheckpointError, UsageError
from meteora_core.file_models import FileModel, read_model
from meteora_core.files import atomic_folder, save_tensors, sha256
from meteora_core.json_files import write_json
from meteora_core.model.sharded import assign, full_tensor
from meteora_core.text import listed
from meteora_core.training.distributed import assign_states, optimizer_states
from meteora_core.training.run_inputs import with_order

_STATE = "state.safetensors"
INFO = "state.json"
_PREFIX = "step-"
_KEPT = ("step", "history", "tokens", "seconds", "evaluations", "best_step", "worse")
_LATER = ("pending",)
"""Entries that the states of earlier versions do not have."""
_Number = int | float | None
"""A number of the log, as it was written: a step stays an integer. JSON has null for NaN and infinity."""


class _Pending(FileModel):
    steps: int = Field(0, ge=0)
    sums: dict[str, float] = Field(default_factory=dict)
    tallies: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(default_factory=dict)


class _SavedProgress(FileModel):
    step: int = Field(ge=0)
    history: list[dict[str, _Number]]
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    evaluations: list[dict[str, _Number]]
    best_step: int = Field(ge=-1)
    best_value: float | None
    worse: int = Field(ge=0)
    inputs: dict[str, Any]
    pending: _Pending = Field(default_factory=_Pending)
    sha256: str | None = None


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        step: Number of completed optimiser steps.
        history: One entry per log line: step, losses, accuracy, tokens.
        tokens: Number of tokens trained on, without padding.
        seconds: Duration of the training in seconds, including the time before interruptions.
        evaluations: One entry per held-out evaluation.
        best_step, best_value: Step and ``loss`` of the best evaluation so far, the one with the lowest loss; -1 and infinity before the first.
        worse: Number of evaluations since the best one.
        best: The weights of the best step, by parameter name, on the CPU.
        pending: The sums of the loop's log since the last log line.
        sampled: Per task, at the end of a run: the number of ``rows`` in the dataset, of rows ``drawn``, of ``passes`` over the rows, of ``tokens``, and the
            ``share`` of all tokens. It follows from the plan and is not saved.
        memory: GPU memory of each process in bytes, at the end of a run: ``start`` (allocated before the first step: the weights, or the process's part of
            them) and ``peak``. Empty on a CPU; not saved.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int = -1
    best_value: float = math.inf
    worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    pending: dict[str, Any] = field(default_factory=dict, repr=False)
    sampled: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, list[int]] = field(default_factory=dict)


def save_state(
    folder: Path,
    state: RunState,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, Any],
    *,
    write: bool = True,
) -> None:
    """Write the folder ``folder/step-N`` atomically, then remove all other states.

    Sharded tensors are gathered one by one, so every process must call this function. The files do not depend on the number of processes.

    Args:
        folder: Folder of the run's resumable states.
        state: Progress of the run.
        parameters: The trained parameters, by name.
        optimizer: AdamW optimiser of the parameters.
        inputs: Inputs that determine the run (settings, hashes of data and adapters); a resumed run must have the same inputs.
        write: Whether this process writes the files.
    """
    tensors: dict[str, Tensor] = {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in parameters.items():
        whole = {f"param.{name}": full_tensor(parameter)}
        whole |= {f"adam.{key}.{name}": value for key, value in optimizer_states(parameter, optimizer).items()}
        tensors |= whole if write else {}
    if not write:
        return
    target = folder / f"{_PREFIX}{state.step}"
    with atomic_folder(target, lock=False) as temporary:  # the run holds the lock of what it trains
        save_tensors(tensors, temporary / _STATE)
        info = {key: getattr(state, key) for key in (*_KEPT, *_LATER)} | {"sha256": sha256(temporary / _STATE)}
        write_json(temporary / INFO, {**info, "best_value": None if state.best_step < 0 else state.best_value, "inputs": inputs})
    for other in saved_states(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    if not folder.is_dir():
        return []
    states = [path for path in folder.iterdir() if path.name.startswith(_PREFIX) and path.name[len(_PREFIX) :].isdigit() and (path / INFO).is_file()]
    return sorted(states, key=lambda path: int(path.name[len(_PREFIX) :]))


def load_state(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> RunState | None:
    """Restore the newest state of a run into parameters and optimizer.

    Returns:
        The progress of the run, or None if nothing was saved.

    Raises:
        UsageError: The saved run had other inputs; the message lists the differences.
        CheckpointError: The saved state is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    states = saved_states(folder)
    if not states:
        return None
    hint = f"remove {states[-1]} to start from the beginning"
    saved = read_model(states[-1] / INFO, _SavedProgress, error=CheckpointError, hint=hint)
    if different := differences(with_order(saved.inputs), inputs):
        raise UsageError(
            f"cannot resume {folder.parent}: {'; '.join(different[:5])}", hint="start again without --resume, or use the settings of the saved run"
        )
    try:
        if saved.sha256 not in (None, sha256(states[-1] / _STATE)):
            raise CheckpointError(f"{states[-1] / _STATE} is not the file that was saved: its hash differs", hint=hint)
        tensors = load_file(states[-1] / _STATE)
    except (SafetensorError, OSError) as broken:
        raise CheckpointError(f"{states[-1]} is broken: {broken}", hint=hint) from broken
    if missing := [name for name, parameter in parameters.items() if f"param.{name}" not in tensors]:
        raise CheckpointError(f"{states[-1]} lacks {listed(missing)}", hint=hint)
    for name, parameter in parameters.items():
        assign(parameter, tensors[f"param.{name}"])
        moments = {key.split(".")[1]: value for key, value in tensors.items() if key.startswith("adam.") and key.split(".", 2)[2] == name}
        if moments:
            assign_states(parameter, optimizer, moments)
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    kept = {key: getattr(saved, key) for key in _KEPT}
    best_value = math.inf if saved.best_value is None else saved.best_value
    return RunState(**kept, best_value=best_value, best=best, pending=saved.pending.model_dump(exclude_unset=True))


def last_loss(history: Sequence[Mapping[str, float]]) -> float:
    """The loss of the last log line that has one; NaN if there is none."""
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), math.nan)


def loss_parts(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The entries ``lm``, ``gate`` and ``accuracy`` of the last log line, as far as they were logged."""
    return {name: history[-1][name] for name in ("lm", "gate", "accuracy") if name in history[-1]} if history else {}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences of two nested dictionaries, as ``key was old, now new``."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} was {a}, now {b}")
    return lines
