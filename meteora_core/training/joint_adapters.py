"""Training of all adapters in one run: forced routing sends every row to its own task's adapter, so that the adapters do not affect each other.

Except for numerical noise, the result is that of training the adapters one after another: the initial weights and batches are the same, each adapter's
loss is divided by its own counts, and its gradient is clipped by its own norm. Two things differ: dropout draws other random numbers, and held-out
evaluation chooses one best step for all adapters together.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.peft_folder import Adapter, AdapterInfo, LoraWeights
from meteora_core.data.dataset_frames import dataset_frame
from meteora_core.errors import UsageError
from meteora_core.model.attach import attach, detach, meteora_layers
from meteora_core.model.base import BaseReference
from meteora_core.model.sharded import full_tensor
from meteora_core.model.tokens import check_observable
from meteora_core.routing import meteora_of
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.batch_plan import Pick, plan_batches
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.distributed import OnModel
from meteora_core.training.encoding import Batch, Encoded, TrainRow, row_lengths
from meteora_core.training.job import TrainJob
from meteora_core.training.lm_metrics import lm_tallies, measure_lm
from meteora_core.training.loop import Computed, Counts, TrainingRun
from meteora_core.training.loss import lm_losses
from meteora_core.training.output_folders import check_targets, only_writer, tidy
from meteora_core.training.run_inputs import run_inputs, short_hash
from meteora_core.training.single_adapter import (
    TrainedAdapter,
    adapter_inputs,
    adapter_is_current,
    adapter_rows,
    finished_adapter,
    save_adapter,
    sixteen_bit,
    train_or_start_anew,
    with_lora,
)
from meteora_core.training.state import RunState, last_loss
from meteora_core.training.task_rows import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    settings: AdapterTrainSettings,
    job: TrainJob,
    *,
    per_task: Mapping[str, AdapterTrainSettings] | None = None,
) -> list[TrainedAdapter]:
    """Train one LoRA for each task in one run, and save each as the PEFT folder ``job.out/<task>``.

    Every optimiser step uses the batches that each task would have alone, with ``settings.together_rows`` rows per forward pass. Tasks whose adapter
    exists already with the same inputs are skipped.

    Args:
        model: The base model; it is unchanged afterwards.
        tokenizer: The base model's tokenizer.
        tasks: Names of built datasets in ``job.data_dir``.
        settings: Rank, number of steps and learning rate of all tasks.
        job: Datasets, folder of adapters, processes.
        per_task: The settings of single tasks; they may differ only in ``max_length``, ``batch_size`` and ``accumulation``.

    Returns:
        One entry per task, in the order of ``tasks``; steps and seconds are those of the whole run.

    Raises:
        DataError: A dataset is missing or broken.
        UsageError: The settings use packing or DoRA, or differ between tasks in other values than the three sizes, the run is sharded, or a task's folder
            contains anything other than an adapter.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    own = {task: (per_task or {}).get(task, settings) for task in tasks}
    _check_combination(settings, own, job)
    dtype = next(model.parameters()).dtype
    inputs = {task: adapter_inputs(job, dtype, task, own[task]) for task in tasks}
    todo = [task for task in tasks if job.force or not adapter_is_current(job.out / task, inputs[task])]
    done = {task: finished_adapter(task, job.out / task) for task in tasks if task not in todo}
    check_targets(job.out, todo)
    for task in done:
        tidy(job.out / task, job.out / f".{task}.states", is_main=job.runtime.is_main)
    if todo:
        with only_writer([job.out / task for task in todo], is_main=job.runtime.is_main):
            encoded, held_out = adapter_rows(model, tokenizer, todo, own, job)
            joint = _JointRun(model, todo, settings, job, inputs, encoded, replace(held_out, batch_size=settings.batch_size))
            state, trained = joint.train([own[task] for task in todo])
            done |= joint.save(state, trained)
    return [done[task] for task in tasks]


def _check_combination(settings: AdapterTrainSettings, own: Mapping[str, AdapterTrainSettings], job: TrainJob) -> None:
    """Raise UsageError for settings, launchers and folders that cannot be used when adapters are trained together."""
    check_targets(job.out, own, replaced=())
    if settings.packing:
        raise UsageError("--packing cannot be combined with --together", hint="leave one of them out")
    if settings.dora:
        raise UsageError("--together cannot train DoRA, whose factors depend on the weights of one adapter", hint="leave out --together")
    if job.runtime.kind in ("fsdp", "deepspeed"):
        raise UsageError(f"--together cannot run with --launcher {job.runtime.kind}", hint="use --launcher ddp, or leave out --together")
    if unequal := [f"{task}.{name}" for task in own for name in _differences(own[task], settings)]:
        raise UsageError(f"--together trains all tasks alike, but there are settings for {', '.join(unequal)}", hint="leave them out, or leave out --together")


def _differences(one: AdapterTrainSettings, other: AdapterTrainSettings) -> list[str]:
    """The names of the settings that differ between two tasks but must be equal in one run."""
    sizes = {"max_length", "batch_size", "accumulation"}
    return [name for name in type(one).model_fields if name not in sizes and getattr(one, name) != getattr(other, name)]


Stacked = dict[str, tuple[tuple[int, ...], Tensor, Tensor]]
"""Trained tensors by module path: the ranks of the adapters, A (R, in) and B (R, out)."""


@dataclass(frozen=True)
class _JointRun:
    """The tasks that are trained in one run.

    Attributes:
        model: The base model.
        tasks: The tasks' names.
        settings: Settings of all tasks.
        job: Datasets, folder of adapters, processes.
        inputs: Per task, the inputs that determine its adapter, including the tasks that were trained before.
        encoded: Per task, its train rows.
        held_out: The held-out rows of all tasks.
    """

    model: PreTrainedModel
    tasks: list[str]
    settings: AdapterTrainSettings
    job: TrainJob
    inputs: dict[str, dict[str, Any]]
    encoded: list[Encoded]
    held_out: HeldOut

    @property
    def title(self) -> str:
        """The name of the run's files; it depends on the tasks, because several runs may write to the same folder at the same time."""
        return f"together-{short_hash(self.tasks)}"

    @property
    def states(self) -> Path:
        return self.job.out / f".{self.title}.states"

    def train(self, own: Sequence[AdapterTrainSettings]) -> tuple[RunState, Stacked]:
        """Train all adapters as one bank, with the settings ``own`` of each task. The model is unchanged afterwards."""
        model, settings = self.model, self.settings
        dtype = next(model.parameters()).dtype
        bank = fresh_bank(model, self.tasks, self.job.base, settings)
        check_observable(bank.modules, "--together")
        attach(model, bank, top_k=1, init="zeros", dropout=settings.dropout)
        try:
            _train_only_adapters(model)
            if settings.gradient_checkpointing:
                enable_checkpointing(model)
            state = train_or_start_anew(self._run(dtype, own), settings, self.job)
            return state, {path: (layer.ranks, full_tensor(layer.lora_A), full_tensor(layer.lora_B)) for path, layer in meteora_layers(model)}
        finally:
            if settings.gradient_checkpointing:
                disable_checkpointing(model)
            detach(model)
            model.eval().requires_grad_(False)

    def _run(self, dtype: torch.dtype, own: Sequence[AdapterTrainSettings]) -> TrainingRun:
        model, job, rows = self.model, self.job, [each.rows for each in self.encoded]
        objective = TogetherObjective(dtype, self.tasks)

        def evaluate(on_model: OnModel) -> dict[str, float]:
            return measure_lm(model, self.held_out, runtime=job.runtime, on_model=on_model, around=lambda batch: objective.around(model, batch))

        return TrainingRun(
            model,
            rows,
            objective,
            self.held_out.pad_token,
            self.states,
            run_inputs("together", job, dtype, self.tasks, self.settings, {"adapters": self.inputs}),
            f"{len(self.tasks)} adapters",
            names=tuple(self.tasks),
            response_only=self.held_out.response_only,
            evaluate=evaluate,
            log_dir=job.out / "tensorboard" / self.title,
            batches=joint_batches(rows, self.settings, job.runtime.world, own),
            clip=partial(clip_each, count=len(self.tasks)),
        )

    def save(self, state: RunState, trained: Stacked) -> dict[str, TrainedAdapter]:
        """Write one PEFT folder per task."""
        done = {}
        peft_model = with_lora(self.model, self.job.base, self.settings)
        try:
            for index, (task, encoded) in enumerate(zip(self.tasks, self.encoded, strict=True)):
                history = [_of_task(entry, task) for entry in state.history]
                folder, alone = self.job.out / task, replace(state, history=history, evaluations=[], best={})
                if self.job.runtime.is_main:
                    weights = {f"base_model.model.{path}.{name}": tensor for path, part in trained.items() for name, tensor in _slices(part, index).items()}
                    frame = dataset_frame(self.job.data_dir, task)
                    save_adapter(peft_model, folder, self.inputs[task], alone, encoded.cut, weights=weights, frame=frame)
                done[task] = TrainedAdapter(folder, False, state.step, last_loss(history), state.tokens, state.seconds, encoded.cut, task)
        finally:
            peft_model.unload()
            self.model.eval().requires_grad_(False)
        if self.job.runtime.is_main:
            shutil.rmtree(self.states, ignore_errors=True)
        self.job.runtime.wait()
        return done


def _train_only_adapters(model: nn.Module) -> None:
    """Make the adapters trainable, in float32, and freeze the gates."""
    for _, layer in meteora_layers(model):
        layer.gate.requires_grad_(False)
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def fresh_bank(model: PreTrainedModel, tasks: Sequence[str], base: BaseReference, settings: AdapterTrainSettings) -> AdapterBank:
    """A bank in which every task has the initial LoRA of :func:`meteora_core.training.single_adapter.train_adapter`."""
    torch.manual_seed(settings.seed)
    peft_model = with_lora(model, base, settings)
    try:
        weights = {
            name.removeprefix("base_model.model."): LoraWeights(
                module.lora_A["default"].weight.detach().float().cpu().clone(),
                module.lora_B["default"].weight.detach().float().cpu().clone(),
                float(module.scaling["default"]),
            )
            for name, module in peft_model.named_modules()
            if hasattr(module, "lora_A") and "default" in module.lora_A
        }
    finally:
        peft_model.unload()
        model.requires_grad_(False)
    infos = [AdapterInfo(task, "", "", base.name, settings.rank, settings.alpha, settings.rslora, settings.dropout) for task in tasks]
    return AdapterBank.stack([Adapter(each, weights) for each in infos])


def joint_batches(
    rows: Sequence[Sequence[TrainRow]], settings: AdapterTrainSettings, world: int, own: Sequence[AdapterTrainSettings]
) -> list[list[list[Pick]]]:
    """Plan the batches of each step: the rows that each task would have alone, with rows of similar length together.

    Returns:
        Per step, per forward pass (of all processes together), ``(task, row)`` pairs.
    """
    lengths = [row_lengths(task_rows) for task_rows in rows]
    plans = [
        plan_batches([task_lengths], each.max_steps * each.accumulation, each.batch_size * world, each.seed)
        for task_lengths, each in zip(lengths, own, strict=True)
    ]
    steps = []
    for step in range(settings.max_steps):
        parts = [plan[step * each.accumulation : (step + 1) * each.accumulation] for plan, each in zip(plans, own, strict=True)]
        picks = [(task, row) for task, part in enumerate(parts) for batch in part for _, row in batch]
        picks.sort(key=lambda pick: lengths[pick[0]][pick[1]])
        size = settings.together_rows * world
        size -= size % world
        cuts = [picks[start : start + size] for start in range(0, len(picks), size)]
        steps.append(cuts)
    return steps


class TogetherObjective:
    """The sum of the tasks' mean language-model losses; each row is computed with its own adapter.

    Args:
        dtype: Number type of the base model.
        names: Names of the tasks.
    """

    def __init__(self, dtype: torch.dtype, names: Sequence[str]) -> None:
        self.dtype, self.names = dtype, names

    @contextmanager
    def around(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Force the routes during the forward and backward pass, because gradient checkpointing runs layers again in the backward pass."""
        with meteora_of(model).force(row_tasks(batch)):
            yield

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """Run the forward pass; call this within :meth:`around`."""
        own = torch.tensor([1 / max(1, count) for count in counts.targets_by_task], device=batch.input_ids.device)
        tasks = row_tasks(batch)[:, None].expand(batch.input_ids.shape)
        with sixteen_bit(batch.input_ids.device, self.dtype):
            loss, losses = lm_losses(model, batch, own[tasks])
        return loss, {}, lm_tallies(replace(batch, gate_labels=tasks), losses, self.names)


def row_tasks(batch: Batch) -> Tensor:
    """Each row's task, int64 (batch,): the label of its labelled tokens, which all belong to one task."""
    return batch.gate_labels.amax(1).clamp(min=0)


def clip_each(parameters: list[nn.Parameter], limit: float, count: int) -> Tensor:
    """Clip each adapter's gradient to norm ``limit``, and return the largest norm before clipping.

    Args:
        parameters: Stacked A and B matrices, each with one block of rows per adapter, all of the same size.
        limit: Largest norm.
        count: Number of adapters.
    """
    gradients = [parameter.grad.view(count, -1) for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.square().sum(1) for gradient in gradients]).sum(0).sqrt()
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None]
    for gradient in gradients:
        gradient.mul_(scale)
    return norms.max()


def _slices(part: tuple[tuple[int, ...], Tensor, Tensor], index: int) -> dict[str, Tensor]:
    ranks, A, B = part
    start = sum(ranks[:index])
    rows = slice(start, start + ranks[index])
    return {"lora_A.default.weight": A[rows].contiguous(), "lora_B.default.weight": B[rows].t().contiguous()}


def _of_task(entry: dict[str, float], task: str) -> dict[str, float]:
    """The log entry of one task, from an entry of the joint log."""
    common = {name: value for name, value in entry.items() if "/" not in name}
    common.pop("loss", None)
    return common if f"lm/{task}" not in entry else {**common, "loss": entry[f"lm/{task}"]}
