"""All adapters in one pass: every row goes to its own task's adapter by forced routing, so the adapters do not touch each other.

The result is that of training them one after another, to numerical noise: the same start, the same batches, each adapter's loss divided by
its own counts and its gradient limited by its own norm. Only dropout draws other random numbers, and with held-out evaluation the best
step is chosen for all adapters at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.peft_folder import Adapter, AdapterInfo, LoraWeights
from meteora_core.errors import UsageError
from meteora_core.model.attach import attach, detach, meteora_layers
from meteora_core.model.base import BaseReference
from meteora_core.model.sharded import full_tensor
from meteora_core.model.tokens import check_observable
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import routing_state
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.batch_plan import Pick, plan_batches
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.distributed import SINGLE, Runtime
from meteora_core.training.encoding import Batch, TrainRow, row_lengths
from meteora_core.training.loop import Computed, Counts, Run, Task
from meteora_core.training.loss import lm_losses
from meteora_core.training.output_folders import check_targets, only_writer, tidy
from meteora_core.training.run_inputs import run_inputs, short_hash
from meteora_core.training.single_adapter import (
    TrainedAdapter,
    adapter_inputs,
    adapter_is_current,
    finished_adapter,
    lm_tallies,
    measure_lm,
    save_adapter,
    sixteen_bit,
    train_or_start_anew,
    with_lora,
)
from meteora_core.training.state import last_loss
from meteora_core.training.task_rows import encoded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    base: BaseReference,
    data_dir: Path,
    out_dir: Path,
    settings: AdapterTrainSettings,
    per_task: Mapping[str, AdapterTrainSettings] | None = None,
    max_rows: int | None = None,
    token_cache: Path | None = None,
    resume: bool = True,
    force: bool = False,
    runtime: Runtime = SINGLE,
    progress: Progress = SILENT,
) -> list[TrainedAdapter]:
    """Train one LoRA for each task in one run, and save each as a PEFT folder ``out_dir/<task>``.

    Every optimiser step holds the batches that the tasks would have had alone, ``settings.together_rows`` rows to a forward pass. Adapters that are there
    already with the same inputs are left out.

    Args:
        model: The base model; it is left as it was.
        tokenizer: Its tokenizer.
        tasks: Built datasets in ``data_dir``.
        base, data_dir, out_dir, settings, max_rows, token_cache, resume, force, runtime, progress: As for
            :func:`meteora_core.training.single_adapter.train_adapter`.
        per_task: The settings of single tasks; they may differ in ``max_length``, ``batch_size`` and ``accumulation`` alone.

    Returns:
        One entry a task, in the order of ``tasks``; steps and seconds are those of the whole run.

    Raises:
        DataError: A dataset is missing or broken.
        UsageError: The settings cannot be combined with it (packing; tasks that differ in more than their sizes), the run is sharded, or a task's
            folder holds something else than an adapter.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    check_targets(out_dir, tasks, replaced=())
    if settings.packing:
        raise UsageError("--packing cannot be combined with --together", hint="leave one of them out")
    if runtime.kind in ("fsdp", "deepspeed"):
        raise UsageError(f"--together cannot run with --launcher {runtime.kind}", hint="use --launcher ddp, or leave out --together")
    own = {task: (per_task or {}).get(task, settings) for task in tasks}
    if unequal := [f"{task}.{name}" for task in tasks for name in _differences(own[task], settings)]:
        raise UsageError(f"--together trains all tasks alike, but there are settings for {', '.join(unequal)}", hint="leave them out, or leave out --together")
    dtype = next(model.parameters()).dtype
    inputs = {task: adapter_inputs(base, dtype, data_dir, task, own[task], max_rows, processes=runtime.world) for task in tasks}
    todo = [task for task in tasks if force or not adapter_is_current(out_dir / task, inputs[task])]
    done = {task: finished_adapter(task, out_dir / task) for task in tasks if task not in todo}
    check_targets(out_dir, todo)
    for task in done:
        tidy(out_dir / task, out_dir / f".{task}.states", is_main=runtime.is_main)
    if todo:
        with only_writer([out_dir / task for task in todo], is_main=runtime.is_main):
            done |= _train(model, tokenizer, todo, inputs, base, data_dir, out_dir, settings, own, max_rows, token_cache, resume, runtime, progress)
    return [done[task] for task in tasks]


def _differences(one: AdapterTrainSettings, other: AdapterTrainSettings) -> list[str]:
    """What two tasks of one run must have alike and do not."""
    sizes = {"max_length", "batch_size", "accumulation"}
    return [name for name in type(one).model_fields if name not in sizes and getattr(one, name) != getattr(other, name)]


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    inputs: dict[str, dict[str, Any]],
    base: BaseReference,
    data_dir: Path,
    out_dir: Path,
    settings: AdapterTrainSettings,
    own: Mapping[str, AdapterTrainSettings],
    max_rows: int | None,
    token_cache: Path | None,
    resume: bool,
    runtime: Runtime,
    progress: Progress,
) -> dict[str, TrainedAdapter]:
    dtype, pad, response_only = next(model.parameters()).dtype, padding_token(model, tokenizer), settings.loss_on == "response"
    source: dict[str, Any] = {"seed": settings.seed, "max_rows": max_rows, "token_cache": token_cache, "progress": progress}
    parts = [encoded_rows(data_dir, task, tokenizer, index, max_length=own[task].max_length, **source) for index, task in enumerate(tasks)]
    encoded, held_out = [each for each, _ in parts], [held for _, held in parts if held]
    check_tokens(model, tokenizer, (row.tokens for each in encoded for row in each.rows))
    rows = [each.rows for each in encoded]
    title = f"together-{short_hash(tasks)}"  # runs of other tasks may go on beside this one
    states = out_dir / f".{title}.states"
    bank = fresh_bank(model, tasks, base, settings)
    check_observable(bank.modules, "--together")
    attach(model, bank, top_k=1, init="zeros", dropout=settings.dropout)
    try:
        for _, layer in meteora_layers(model):
            layer.gate.requires_grad_(False)
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if settings.gradient_checkpointing:
            enable_checkpointing(model)
        objective = TogetherObjective(dtype, tasks)

        def evaluate(work: Run) -> dict[str, float]:
            options: dict[str, Any] = {"runtime": runtime, "run": work, "around": lambda batch: objective.around(model, batch)}
            return measure_lm(model, held_out, pad, tasks, settings.batch_size, response_only, **options)

        run = Task(
            model,
            rows,
            objective,
            pad,
            states,
            run_inputs("together", base, dtype, data_dir, tasks, settings, processes=runtime.world, max_rows=max_rows, adapters=inputs),
            f"{len(tasks)} adapters",
            names=tuple(tasks),
            response_only=response_only,
            evaluate=evaluate,
            log_dir=out_dir / "tensorboard" / title,
            batches=joint_batches(rows, settings, runtime.world, [own[task] for task in tasks]),
            clip=partial(clip_each, count=len(tasks)),
        )
        state = train_or_start_anew(run, settings, resume=resume, runtime=runtime, progress=progress)
        trained = {path: (layer.ranks, full_tensor(layer.lora_A), full_tensor(layer.lora_B)) for path, layer in meteora_layers(model)}
    finally:
        if settings.gradient_checkpointing:
            disable_checkpointing(model)
        detach(model)
        model.eval().requires_grad_(False)
    done = {}
    peft_model = with_lora(model, base, settings)
    try:
        for place, task in enumerate(tasks):
            history = [_of_task(entry, task) for entry in state.history]
            alone = replace(state, history=history, evaluations=[], best={})
            if runtime.is_main:
                weights = {f"base_model.model.{path}.{name}": tensor for path, part in trained.items() for name, tensor in _slices(part, place).items()}
                save_adapter(peft_model, out_dir / task, inputs[task], alone, encoded[place].cut, weights=weights)
            loss = last_loss(history)
            done[task] = TrainedAdapter(task, out_dir / task, False, state.step, loss, state.tokens, state.seconds, encoded[place].cut)
    finally:
        peft_model.unload()
        model.eval().requires_grad_(False)
    if runtime.is_main:
        shutil.rmtree(states, ignore_errors=True)
    runtime.wait()
    return done


def fresh_bank(model: PreTrainedModel, tasks: Sequence[str], base: BaseReference, settings: AdapterTrainSettings) -> AdapterBank:
    """A bank in which every task has the very LoRA that :func:`meteora_core.training.single_adapter.train_adapter` would start from."""
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
    info = {"source": "", "sha256": "", "base": base.name, "rank": settings.rank, "alpha": settings.alpha}
    infos = [AdapterInfo(name=task, rslora=settings.rslora, dropout=settings.dropout, **info) for task in tasks]  # type: ignore[arg-type]
    return AdapterBank.stack([Adapter(each, weights) for each in infos])


def joint_batches(
    rows: Sequence[Sequence[TrainRow]], settings: AdapterTrainSettings, world: int, own: Sequence[AdapterTrainSettings]
) -> list[list[list[Pick]]]:
    """Per step, per forward pass (of all processes), ``(task, row)`` pairs: what each task would have had alone, rows of like length together."""
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
    """The sum over tasks of each task's mean language-model loss, every row by its own adapter.

    Args:
        dtype: Of the base.
        names: The tasks.
    """

    def __init__(self, dtype: torch.dtype, names: Sequence[str]) -> None:
        self.dtype, self.names = dtype, names

    @contextmanager
    def around(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Force the routes for forward and backward pass (layers run again there with gradient checkpointing)."""
        with routing_state(model).force(row_tasks(batch)):
            yield

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """The forward pass, within :meth:`around`."""
        own = torch.tensor([1 / max(1, count) for count in counts.targets_by_task], device=batch.input_ids.device)
        weights = own[row_tasks(batch)][:, None].expand(batch.input_ids.shape)
        with sixteen_bit(batch.input_ids.device, self.dtype):
            loss, losses = lm_losses(model, batch, weights)
        return loss, {}, lm_tallies(batch, losses, self.names)


def row_tasks(batch: Batch) -> Tensor:
    """Each row's task, int64 (batch,): the label of its first token."""
    return batch.gate_labels[:, 0].clamp(min=0)


def clip_each(parameters: list[nn.Parameter], limit: float, count: int) -> Tensor:
    """Scale each adapter's gradient down to norm ``limit``; return the largest norm before.

    Args:
        parameters: Stacked A and B, each with one equal block of rows an adapter.
        limit: Largest norm.
        count: How many adapters.
    """
    gradients = [parameter.grad.view(count, -1) for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.square().sum(1) for gradient in gradients]).sum(0).sqrt()
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None]
    for gradient in gradients:
        gradient.mul_(scale)
    return norms.max()


def _slices(part: tuple[tuple[int, ...], Tensor, Tensor], place: int) -> dict[str, Tensor]:
    ranks, A, B = part
    start = sum(ranks[:place])
    rows = slice(start, start + ranks[place])
    return {"lora_A.default.weight": A[rows].contiguous(), "lora_B.default.weight": B[rows].t().contiguous()}


def _of_task(entry: dict[str, float], task: str) -> dict[str, float]:
    """A line of the common log as one task's."""
    kept = {name: value for name, value in entry.items() if "/" not in name}
    kept.pop("loss", None)
    return kept if f"lm/{task}" not in entry else {**kept, "loss": entry[f"lm/{task}"]}
