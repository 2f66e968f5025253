"""What may follow the closed form: routed rows and gradient steps (``meteora route --routed-rows --steps N``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.checkpoints.gate_statistics import GateStatistics
from meteora_core.errors import UsageError
from meteora_core.living.collector import Collector
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.progress import Progress
from meteora_core.routing import meteora_of
from meteora_core.settings import GateTrainSettings
from meteora_core.text import listed
from meteora_core.training.encoding import TrainRow
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.gates import trainable_in_float32
from meteora_core.training.loop import TrainingRun, train
from meteora_core.training.state import last_loss
from meteora_core.training.statistics import routed_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATE = 1e-2
"""Peak learning rate of the gates; high rates work best after a closed-form start."""


def _rows_of_all(collector: Collector, names: Sequence[str], what: str, option: str) -> list[Sequence[TrainRow]]:
    """The encoded train rows of all adapters. Raises UsageError if an adapter has none."""
    if missing := [name for name in names if collector.rows(name) is None]:
        raise UsageError(f"{what} need rows of all adapters, and there are none of {listed(missing)}", hint=f"leave out {option}, or give rows with --data")
    return [collector.train_rows(name, index) for index, name in enumerate(names)]


def solve_with_routed_rows(model: PreTrainedModel, collector: Collector, statistics: Sequence[GateStatistics], progress: Progress) -> None:
    """Solve the gates of a routed model again, with rows that run as its present gates route them.

    The gates then depend on all adapters at once. If the bank changes, they count as trained, see :class:`meteora_core.living.live_bank.LiveBank`.

    Args:
        model: A model with adapters attached and gates in closed form.
        collector: Collector that has the rows of all adapters.
        statistics: Statistics of each adapter, in order.
        progress: Receiver of progress reports.

    Raises:
        UsageError: An adapter has no rows.
        MeteoraError: The sums do not fit in memory.
    """
    state = meteora_of(model)
    rows = _rows_of_all(collector, state.names, "routed rows", "--routed-rows")
    gates = routed_gates(model, rows, statistics, replace(collector.how, recipe=statistics[0].header.recipe), progress=progress)
    with torch.no_grad():
        for path, layer in meteora_layers(model):
            layer.gate.copy_(gates[path])
    state.gates = "trained"


def train_solved_gates(model: PreTrainedModel, collector: Collector, steps: int, workspace: Path, progress: Progress) -> dict[str, Any]:
    """Train the gates of a routed model by gradients, starting from their present values; the adapters stay as they are.

    Rows, batch size, seed and answer share are those of the collector. The gates are trained in float32 and converted back to their dtype.

    Args:
        model: A model with adapters attached and gates in closed form.
        collector: Collector that has the rows of all adapters.
        steps: Number of optimiser steps.
        workspace: Folder for states of the training.
        progress: Receiver of progress reports.

    Returns:
        The record of the training: ``steps``, ``loss``, ``tokens`` of the training and ``seconds``.

    Raises:
        UsageError: An adapter has no rows.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    how, state = collector.how, meteora_of(model)
    rows = _rows_of_all(collector, state.names, "gradient steps", "--steps")
    settings = GateTrainSettings(
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        batch_size=how.batch_size,
        max_length=how.max_length,
        seed=how.seed,
        answer_share=how.recipe.answer_share,
        save_steps=steps,
        log_to="none",
    )
    dtypes = {path: layer.gate.dtype for path, layer in meteora_layers(model)}
    trainable_in_float32(model, "gates")
    run = TrainingRun(
        model,
        rows,
        GateObjective(settings.beta, answer_share=settings.answer_share),
        how.pad_token,
        workspace / "states",
        {},
        "gates",
        names=state.names,
    )
    try:
        done = train(run, settings, progress=progress)
    finally:
        set_trainable(model, "none")
        for path, layer in meteora_layers(model):
            layer.gate.data = layer.gate.data.to(dtypes[path])
    state.gates = "trained"
    return {"steps": done.step, "loss": last_loss(done.history), "trained_tokens": done.tokens, "trained_seconds": done.seconds}
