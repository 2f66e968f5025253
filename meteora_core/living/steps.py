"""Gradient steps after the closed form: ``meteora route --steps``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.errors import UsageError
from meteora_core.living.collector import Collector
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.progress import Progress
from meteora_core.routing import meteora_of
from meteora_core.settings import GateTrainSettings
from meteora_core.text import listed
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.gates import trainable_in_float32
from meteora_core.training.loop import TrainingRun, train
from meteora_core.training.state import last_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATE = 1e-2
"""Peak learning rate of the gates; high rates work best after a closed-form start."""


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
    if missing := [name for name in state.names if collector.rows(name) is None]:
        raise UsageError(
            f"gradient steps need rows of all adapters, and there are none of {listed(missing)}", hint="leave out --steps, or give rows with --data"
        )
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
        [collector.train_rows(name, index) for index, name in enumerate(state.names)],
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
