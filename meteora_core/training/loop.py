"""The training loop: AdamW with warm-up and cosine decay, accumulation weighted by tokens, held-out evaluation, and states from which a run can resume.

It runs on any number of processes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.model.nonfinite import first_nonfinite_module
from meteora_core.model.sharded import assign, full_tensor
from meteora_core.progress import SILENT, Progress
from meteora_core.settings import OptimSettings
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.batch_plan import Pick, RowMix, plan_batches, plan_packed
from meteora_core.training.distributed import SINGLE, OnModel, Runtime
from meteora_core.training.encoding import (
    Batch,
    TrainRow,
    collate,
    collate_packed,
    count_row_answers,
    count_row_labels,
    count_row_targets,
    row_lengths,
    row_target_labels,
)
from meteora_core.training.packing import check_packing
from meteora_core.training.state import RunState, load_state, save_state, saved_states
from meteora_core.training.trackers import Curves, CurvesOf, open_curves


@dataclass(frozen=True)
class Counts:
    """The counts that loss sums are divided by, each over all batches and processes of one optimiser step.

    Attributes:
        targets: Number of positions with a target.
        gate_labels: Number of positions with a gate label.
        targets_by_task: Number of positions with a target, per task.
        answer_labels: Number of response positions with a gate label.
        targets_by_label: Number of positions with a target, per gate label; the parts of a composite count for their own tasks.
    """

    targets: int
    gate_labels: int
    targets_by_task: tuple[int, ...] = ()
    answer_labels: int = 0
    targets_by_label: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepLoss:
    """One batch's part of a step's loss, after its backward pass.

    Attributes:
        loss: Detached scalar; the losses of a step's batches add up to the step's loss.
        parts: Further values to log (``lm``, ``gate``, ``accuracy``), detached scalars that are summed over the batches of a step.
        tallies: Values that are logged as a mean: float32 (2,), a sum and its count.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    tallies: dict[str, Tensor]


Computed = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""Loss with gradients, parts, tallies; see :class:`StepLoss`."""


class Objective(Protocol):
    """Computes one batch's part of a step's loss."""

    def around(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        """The context in which the forward and backward pass of a batch run."""

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """Run the forward pass."""


@dataclass(frozen=True)
class TrainingRun:
    """The model, rows and objective of one training run.

    Attributes:
        model: The model; it is in training mode while the loop runs.
        rows: Per task, its rows.
        objective: The function that is minimised.
        pad_token: Token id of the padding.
        folder: Folder of the resumable states.
        inputs: Inputs that determine the run; a resumed run must have the same inputs.
        title: Title of the progress bar and of the curves.
        names: The tasks' names, for messages.
        response_only: Whether the language-model loss leaves the prompts' tokens out.
        balanced: Whether the same number of tokens is drawn from every task; False draws every row equally often.
        extra, extra_share: Rows that belong to no single task (composites and joined rows), and their fraction of all drawn rows.
        extra_name: Name of these rows in the record of what was drawn.
        evaluate: Function that returns held-out metrics by name; the lowest ``loss`` determines the best weights. Empty if no rows are held out.
        log_dir: Folder of TensorBoard's event files; None writes none.
        batches: The batches of every step, per batch ``(task, row)`` pairs; None plans them from the settings.
        clip: Function that clips the gradients and returns their norm; None clips the norm of all gradients together.
        rate: Function from a parameter's name to its learning-rate multiplier; None is 1 for all parameters.
    """

    model: nn.Module
    rows: Sequence[Sequence[TrainRow]]
    objective: Objective
    pad_token: int
    folder: Path
    inputs: dict[str, Any]
    title: str
    names: tuple[str, ...] = ()
    response_only: bool = False
    balanced: bool = True
    extra: Sequence[TrainRow] = ()
    extra_share: float = 0.0
    extra_name: str = "composites"
    evaluate: Callable[[OnModel], dict[str, float]] | None = None
    log_dir: Path | None = None
    batches: Sequence[Sequence[list[Pick]]] | None = None
    clip: Callable[[list[nn.Parameter], float], Tensor] | None = None
    rate: Callable[[str], float] | None = None


def learning_rate(step: int, settings: OptimSettings) -> float:
    """The learning rate of a step (from 0): a linear increase over ``warmup_ratio`` of the steps, then a cosine decay to 0."""
    warmup = max(1, round(settings.warmup_ratio * settings.max_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.max_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(run: TrainingRun, settings: OptimSettings, *, resume: bool = False, runtime: Runtime = SINGLE, progress: Progress = SILENT) -> RunState:
    """Run the optimiser steps, from the start or from a saved state.

    The seed and the global batch size determine the global batches; each process computes its part of them. Random numbers (dropout) are seeded at the
    start of every step.

    Args:
        run: Model, rows and objective.
        settings: Number of steps, learning rates, batch sizes.
        resume: Whether to continue from the newest saved state, if there is one.
        runtime: The processes.
        progress: Object that loss, tokens/s and remaining time are reported to.

    Returns:
        The final state. The parameters are trained in place; with held-out evaluation they are those of the best evaluation.

    Raises:
        UsageError: ``resume`` is set and the saved run has other inputs, or packing is on and the model lets packed rows attend to each other (tested
            before the model is wrapped, and only if it is not sharded).
        MeteoraError: The loss or gradient is NaN or infinite (the message names step, batch and layer), or memory ran out (the hint names settings to
            lower).
    """
    if settings.packing and runtime.kind in ("none", "ddp"):
        device = runtime.device or next(run.model.parameters()).device
        check_packing(run.model, run.rows, run.pad_token, settings.batch_size, device)
    optimizer = runtime.prepare(run.model, lambda trained: _optimizer(run, settings, trained))
    parameters = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    source = _Source(run, settings, runtime.world)
    stepper = _Stepper(run, settings, runtime, optimizer, parameters, source)
    memory = _Memory(runtime, stepper.device)
    run.model.train()
    if resume and runtime.kind == "deepspeed" and saved_states(run.folder) and settings.max_steps:
        stepper.step(0, rate=0.0)  # DeepSpeed creates its optimiser states in its first step; load_state restores all that this step changes
    state = (load_state(run.folder, parameters, optimizer, run.inputs) if resume else None) or RunState()
    runtime.wait()
    curves = open_curves(settings.log_to if runtime.is_main else "none", CurvesOf(run.title, run.log_dir, run.inputs, state.step))
    began, before, start_tokens = time.monotonic(), state.seconds, state.tokens
    log = _Log(runtime, state.pending, stepper.device)
    with progress.task(run.title, total=settings.max_steps, unit="steps") as bar:
        bar.update(state.step)
        try:
            while state.step < settings.max_steps and not (settings.patience and state.worse >= settings.patience):
                log.add(stepper.step(state.step))
                state.step += 1
                state.tokens += source.tokens(state.step - 1)
                state.seconds = before + time.monotonic() - began
                last = state.step == settings.max_steps
                if state.step % settings.log_steps == 0 or last:
                    entry = {"step": state.step, **log.flush(), "tokens": state.tokens, "seconds": round(state.seconds, 2)}
                    state.history.append(entry)
                    curves.log(state.step, {f"train/{name}": value for name, value in entry.items() if name not in ("step", "seconds")})
                if settings.eval_steps and (state.step % settings.eval_steps == 0 or last):
                    _evaluate(run, state, parameters, runtime, curves)
                bar.update(1, total=None, **_shown(state, start_tokens, time.monotonic() - began))
                if settings.max_steps > settings.save_steps and (state.step % settings.save_steps == 0 or last):  # last: measuring and saving may fail
                    state.pending = log.pending()
                    save_state(run.folder, state, parameters, optimizer, run.inputs, write=runtime.is_main)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise MeteoraError(
                f"out of memory at step {state.step + 1}",
                hint="lower --batch-size (raise --accumulation to keep the total) or --max-length, or pass --gradient-checkpointing",
            ) from error
        finally:
            curves.close()
    for name, parameter in parameters.items() if state.best else ():
        assign(parameter, state.best[name])
    run.model.eval()
    state.sampled, state.memory = source.sampled(state.step), memory.used()
    return state


def _optimizer(run: TrainingRun, settings: OptimSettings, trained: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with one parameter group per learning rate; the group's ``factor`` multiplies the schedule."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in trained:
        groups.setdefault(1.0 if run.rate is None else run.rate(names[id(parameter)]), []).append(parameter)
    parameter_groups = [{"params": members, "lr": settings.learning_rate * factor, "factor": factor} for factor, members in groups.items()]
    return torch.optim.AdamW(parameter_groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch could not allocate memory, on a GPU or on the CPU (where it raises an ordinary RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _evaluate(run: TrainingRun, state: RunState, parameters: dict[str, nn.Parameter], runtime: Runtime, curves: Curves) -> None:
    """Measure the model on held-out rows, and store the weights in ``state`` if they are the best so far."""
    measured = run.evaluate(runtime.run) if run.evaluate else {}
    run.model.train()
    if "loss" not in measured:
        return
    state.evaluations.append({"step": state.step, **{name: round(value, 6) for name, value in measured.items()}})
    curves.log(state.step, {f"held_out/{name}": value for name, value in measured.items()})
    if measured["loss"] < state.best_value:
        state.best_step, state.best_value, state.worse = state.step, measured["loss"], 0
        state.best = {name: full_tensor(parameter) for name, parameter in parameters.items()}
    else:
        state.worse += 1


class _Source:
    """The batches of every step, with the rows and their counts."""

    def __init__(self, run: TrainingRun, settings: OptimSettings, world: int) -> None:
        self.run, self.settings = run, settings
        self.rows = [*run.rows, run.extra] if run.extra_share else list(run.rows)
        self._held: dict[Pick, TrainRow] = {}
        lengths = [row_lengths(rows) for rows in run.rows]
        count, size = settings.max_steps * settings.accumulation, settings.batch_size * world
        self.lengths = [*lengths, [len(row) for row in run.extra]] if run.extra_share else lengths
        mix = RowMix([len(row) for row in run.extra], run.extra_share, run.balanced)
        self.steps: Sequence[Sequence[list[list[Pick]]]]
        if run.batches is not None:
            self.steps = [[[[pick] for pick in batch] for batch in step] for step in run.batches]
        else:
            if settings.packing:
                plan = plan_packed(lengths, count, size, settings.max_length, settings.seed, mix)
            else:
                plan = [[[pick] for pick in batch] for batch in plan_batches(lengths, count, size, settings.seed, mix)]
            self.steps = [plan[first : first + settings.accumulation] for first in range(0, count, settings.accumulation)]

    def row(self, pick: Pick) -> TrainRow:
        """A row of the current step, for which :meth:`counts` was called last; each row is read once per step."""
        if pick not in self._held:
            self._held[pick] = self.rows[pick[0]][pick[1]]
        return self._held[pick]

    def picked(self, step: int) -> list[TrainRow]:
        return [self.row(pick) for batch in self.steps[step] for sequence in batch for pick in sequence]

    def counts(self, step: int) -> Counts:
        self._held = {}
        by_task = [0] * len(self.rows)
        for batch in self.steps[step]:
            for sequence in batch:
                for pick in sequence:
                    by_task[pick[0]] += count_row_targets(self.row(pick), self.run.response_only)
        rows = self.picked(step)
        labels = Counter(label for row in rows for label in row_target_labels(row, self.run.response_only))
        by_label = tuple(labels[task] for task in range(len(self.run.rows)))
        return Counts(max(1, sum(by_task)), max(1, sum(map(count_row_labels, rows))), tuple(by_task), sum(map(count_row_answers, rows)), by_label)

    def sampled(self, steps: int) -> dict[str, dict[str, float]]:
        """The rows and tokens of each task in the first ``steps`` steps; see :class:`meteora_core.training.state.RunState`."""
        drawn, tokens = [0] * len(self.lengths), [0] * len(self.lengths)
        for which, row in (pick for step in self.steps[:steps] for batch in step for sequence in batch for pick in sequence):
            drawn[which] += 1
            tokens[which] += self.lengths[which][row]
        names = [*(self.run.names or map(str, range(len(self.run.rows)))), self.run.extra_name]
        return {
            name: {"rows": len(rows), "drawn": count, "passes": round(count / len(rows), 3), "tokens": seen, "share": round(seen / max(1, sum(tokens)), 4)}
            for name, rows, count, seen in zip(names, self.lengths, drawn, tokens, strict=False)
        }

    def tokens(self, step: int) -> int:
        return sum(map(len, self.picked(step)))

    def batch(self, sequences: list[list[Pick]]) -> Batch:
        rows = [[self.row(pick) for pick in sequence] for sequence in sequences]
        if self.settings.packing:
            return collate_packed(rows, self.run.pad_token, response_only=self.run.response_only)
        return collate([row for sequence in rows for row in sequence], self.run.pad_token, response_only=self.run.response_only)


class _Stepper:
    """Runs single optimiser steps."""

    def __init__(
        self,
        run: TrainingRun,
        settings: OptimSettings,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        source: _Source,
    ) -> None:
        self.run, self.settings, self.runtime, self.optimizer, self.source = run, settings, runtime, optimizer, source
        self.parameters = list(parameters.values())
        self.device = runtime.device or (self.parameters[0].device if self.parameters else next(run.model.parameters()).device)

    def step(self, number: int, rate: float | None = None) -> StepLoss:
        settings, runtime = self.settings, self.runtime
        torch.manual_seed((settings.seed * 1_000_003 + number) * runtime.world + runtime.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = (learning_rate(number, settings) if rate is None else rate) * group.get("factor", 1.0)
        counts, batches = self.source.counts(number), self.source.steps[number]
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, sequences in enumerate(batches):
            batch = self.source.batch(runtime.mine(sequences)).to(self.device)
            around = self.run.objective.around(self.run.model, batch)
            with runtime.accumulate(last=index == len(batches) - 1), without_cudnn_attention(), around:
                loss, parts, tallies = runtime.run(lambda model, batch=batch: self.run.objective.compute(model, batch, counts))  # type: ignore[misc]
                self._check(loss, batch, number, index, sequences)
                runtime.backward(loss)
            losses.append(StepLoss(loss.detach(), parts, tallies))
        if settings.max_grad_norm and self.parameters:
            norm = runtime.clip(self.parameters, settings.max_grad_norm, self.run.clip)
            if not math.isfinite(value := float(full_tensor(norm))):
                raise MeteoraError(f"the gradient's norm is {value} at step {number + 1}; the loss is finite", hint=_LOWER)
        self.optimizer.step()
        return _add(losses)

    def _check(self, loss: Tensor, batch: Batch, number: int, index: int, sequences: list[list[Pick]]) -> None:
        """Raise MeteoraError if the loss is NaN or infinite in any process, before it changes the weights."""
        value = float(loss.detach())
        if not float(self.runtime.total(torch.tensor(float(not math.isfinite(value)), device=self.device))):
            return
        nonfinite = self.runtime.run(lambda model: first_nonfinite_module(model, lambda: model(**batch.model_inputs(), use_cache=False)))
        names = (*self.run.names, "composite") if self.run.names else ()
        rows = [f"{names[which]} {row}" if which < len(names) else str(row) for sequence in sequences for which, row in sequence]
        named = ", ".join(rows[:6]) + (", …" if len(rows) > 6 else "")
        where = f"the first layer whose output is not finite is {nonfinite[0]}" if nonfinite else "every layer's output is finite"
        shown = value if not math.isfinite(value) else "not finite in another process"
        raise MeteoraError(f"the loss is {shown} at step {number + 1}, batch {index + 1} (training rows {named}); {where}", hint=_LOWER)


_LOWER = "lower --lr, or train in float32 with --dtype float32"


class _Memory:
    """The GPU memory of all processes since this object was created; see :class:`meteora_core.training.state.RunState`."""

    def __init__(self, runtime: Runtime, device: torch.device) -> None:
        self.runtime, self.device, self.start = runtime, device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)

    def used(self) -> dict[str, list[int]]:
        if self.device.type != "cuda":
            return {}
        mine = torch.zeros(2, self.runtime.world, dtype=torch.int64, device=self.device)
        mine[:, self.runtime.rank] = torch.tensor([self.start, torch.cuda.max_memory_allocated(self.device)])
        start, peak = self.runtime.total(mine).tolist()
        return {"start": start, "peak": peak}


def _add(losses: list[StepLoss]) -> StepLoss:
    total, rest = losses[0], losses[1:]
    for each in rest:
        parts = {name: value + each.parts[name] for name, value in total.parts.items()}
        tallies = {name: value + each.tallies[name] for name, value in total.tallies.items()}
        total = StepLoss(total.loss + each.loss, parts, tallies)
    return total


class _Log:
    """Means of the logged values since the last log line, over all processes.

    Args:
        runtime: The processes.
        pending: Result of :meth:`pending` of an interrupted run; the main process adds these sums to its own.
        device: Device of the sums.
    """

    def __init__(self, runtime: Runtime, pending: Mapping[str, Any], device: torch.device) -> None:
        self.runtime, self.steps = runtime, int(pending.get("steps", 0))
        mine = 1.0 if runtime.is_main else 0.0
        self.sums = {name: mine * torch.tensor(value, device=device) for name, value in pending.get("sums", {}).items()}
        self.tallies = {name: mine * torch.tensor(value, device=device) for name, value in pending.get("tallies", {}).items()}

    def pending(self) -> dict[str, Any]:
        """The sums of all processes since the last log line, as JSON values. Every process must call this method."""
        sums = {name: float(self.runtime.total(value.float())) for name, value in self.sums.items()}
        return {"steps": self.steps, "sums": sums, "tallies": {name: self.runtime.total(value.float()).tolist() for name, value in self.tallies.items()}}

    def add(self, step_loss: StepLoss) -> None:
        self.steps += 1
        for into, values in ((self.sums, {"loss": step_loss.loss, **step_loss.parts}), (self.tallies, step_loss.tallies)):
            for name, value in values.items():
                into[name] = into[name] + value if name in into else value.clone()

    def flush(self) -> dict[str, float]:
        names = [*self.sums, *self.tallies]
        flat = torch.stack([*(torch.stack([value.float(), value.new_zeros((), dtype=torch.float32)]) for value in self.sums.values()), *self.tallies.values()])
        totals = self.runtime.total(flat).tolist()
        means = {}
        for name, (total, count) in zip(names, totals, strict=True):
            if name in self.sums:
                means[name] = total / self.steps
            elif count:
                means[name] = total / count
        self.sums, self.tallies, self.steps = {}, {}, 0
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
    if state.best_step >= 0:
        shown["held out"] = f"{state.evaluations[-1]['loss']:.3f}"
    return shown
