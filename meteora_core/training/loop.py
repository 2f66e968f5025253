"""The training loop: AdamW, warm-up and cosine, accumulation weighted by tokens, resumable at any step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.progress import SILENT, Progress
from meteora_core.settings import OptimSettings
from meteora_core.training.plan import plan_batches
from meteora_core.training.rows import Batch, TrainRow, collate
from meteora_core.training.state import RunState, load_state, save_state


@dataclass(frozen=True)
class Counts:
    """What sums are divided by: targets and gate labels of one whole optimiser step, over all its batches and processes."""

    targets: int
    gate_labels: int


@dataclass(frozen=True)
class StepLoss:
    """One batch's share of a step's loss, after its backward pass.

    Attributes:
        loss: Detached scalar; the shares of a step add up to its loss.
        parts: What else to log, each a detached scalar that adds up over the batches of a step (``lm``, ``gate``, ``accuracy``).
    """

    loss: Tensor
    parts: dict[str, Tensor]


Objective = Callable[[nn.Module, Batch, Counts], StepLoss]


@dataclass(frozen=True)
class Task:
    """One run of the loop.

    Attributes:
        model: In training mode while it runs.
        parameters: What trains, by name.
        rows: Per task, its rows.
        objective: Computes a batch's share of the step's loss and runs its backward pass.
        pad_token: For padding.
        folder: Where resumable states are kept.
        inputs: What fixes the run; a resumed run must have the same.
        title: For the progress bar.
        response_only: Leave the prompts' tokens out of the language-model loss.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    rows: Sequence[Sequence[TrainRow]]
    objective: Objective
    pad_token: int
    folder: Path
    inputs: dict[str, Any]
    title: str
    response_only: bool = False


def learning_rate(step: int, settings: OptimSettings) -> float:
    """The rate of step ``step`` (from 0): a linear rise over ``warmup_ratio`` of the steps, then half a cosine down to 0."""
    warmup = max(1, round(settings.warmup_ratio * settings.max_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.max_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(task: Task, settings: OptimSettings, *, resume: bool = False, progress: Progress = SILENT) -> RunState:
    """Run, or go on with, the optimiser steps.

    Args:
        task: What to train on what.
        settings: Steps, rates, sizes.
        resume: Go on from the newest saved state, if there is one.
        progress: Gets loss, tokens/s and the time left.

    Returns:
        The final state; the parameters are trained in place.

    Raises:
        UsageError: ``resume`` with other inputs than the saved run's.
        MeteoraError: The loss is NaN or infinite (step named), or memory ran out (says what to lower).
    """
    device = next(iter(task.parameters.values())).device
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(task.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    state = (load_state(task.folder, task.parameters, optimizer, task.inputs) if resume else None) or RunState()
    lengths = [[len(row) for row in rows] for rows in task.rows]
    plan = plan_batches(lengths, settings.max_steps * settings.accumulation, settings.batch_size, settings.seed)
    task.model.train()
    began, before, start_tokens = time.monotonic(), state.seconds, state.tokens
    log = _Log(settings.log_steps)
    with progress.task(task.title, total=settings.max_steps, unit="steps") as bar:
        bar.update(state.step)
        try:
            while state.step < settings.max_steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(state.step, settings)
                first = state.step * settings.accumulation
                batches = [
                    collate([task.rows[which][row] for which, row in picks], task.pad_token).to(device) for picks in plan[first : first + settings.accumulation]
                ]
                log.add(_step(task, batches, optimizer, settings))
                state.step += 1
                state.tokens += sum(batch.tokens for batch in batches)
                state.seconds = before + time.monotonic() - began
                last = state.step == settings.max_steps
                if state.step % settings.log_steps == 0 or last:
                    state.history.append({"step": state.step, **log.flush(state.step), "tokens": state.tokens, "seconds": round(state.seconds, 2)})
                bar.update(1, total=None, **_shown(state, start_tokens, time.monotonic() - began))
                if state.step % settings.save_steps == 0 and not last:
                    save_state(task.folder, state, task.parameters, optimizer, task.inputs)
        except torch.OutOfMemoryError as error:
            raise MeteoraError(
                f"out of memory at step {state.step + 1}",
                hint="lower --batch-size (raise --accumulation to keep the total) or --max-length, or pass --gradient-checkpointing",
            ) from error
    task.model.eval()
    return state


def _step(task: Task, batches: list[Batch], optimizer: torch.optim.Optimizer, settings: OptimSettings) -> dict[str, Tensor]:
    from meteora_core.training.loss import count_gate_labels, count_targets

    counts = Counts(max(1, sum(map(count_targets, batches))), max(1, sum(map(count_gate_labels, batches))))
    optimizer.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    for batch in batches:
        share = task.objective(task.model, batch, counts)
        for name, value in {"loss": share.loss, **share.parts}.items():
            total[name] = total[name] + value if name in total else value
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(list(task.parameters.values()), settings.max_grad_norm)
    optimizer.step()
    return total


class _Log:
    """Means of the logged parts since the last line."""

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, parts: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def flush(self, step: int) -> dict[str, float]:
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        if not math.isfinite(means.get("loss", 0.0)):
            raise MeteoraError(
                f"the loss is {means['loss']} within steps {step - self.steps + 1} to {step}",
                hint="lower --lr, or train in float32 with --dtype float32",
            )
        self.sums, self.steps = {}, 0
        return {name: round(value, 6) for name, value in means.items()}


def _shown(state: RunState, start_tokens: int, seconds: float) -> dict[str, str]:
    shown = {"tok/s": f"{(state.tokens - start_tokens) / max(seconds, 1e-9):.0f}"}
    if state.history:
        latest = state.history[-1]
        shown["loss"] = f"{latest['loss']:.3f}"
        if "gate" in latest:
            shown["gate"] = f"{latest['gate']:.3f}"
        if "accuracy" in latest:
            shown["routed right"] = f"{latest['accuracy']:.0%}"
    return shown
