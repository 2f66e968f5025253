"""Stage "gates": the gate of every linear learns which adapter each token wants; the adapters may train along."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.checkpoints.native import check_replaceable, save_checkpoint
from meteora_core.checkpoints.native_config import CONFIG_FILE, read_config
from meteora_core.data.rows import build_commands
from meteora_core.errors import UsageError
from meteora_core.model.attach import attach, detach, meteora_layers, set_trainable
from meteora_core.model.base import BaseReference
from meteora_core.model.sharded import full_tensor, is_zero
from meteora_core.model.tokens import check_observable
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.names import check_names
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import is_regular
from meteora_core.routing import IGNORE, GateObservations, routing_state
from meteora_core.settings import GateTrainSettings
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.batch_plan import plan_batches
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.composites import POOL, make_composites
from meteora_core.training.distributed import SINGLE, Runtime
from meteora_core.training.encoding import Batch, TrainRow, collate, row_lengths
from meteora_core.training.gate_metrics import gate_tallies, hit_sum, measure_gates
from meteora_core.training.loop import Computed, Counts, Run, StepLoss, Task, train
from meteora_core.training.loss import lm_losses
from meteora_core.training.output_folders import only_writer, tidy
from meteora_core.training.ridge import ridge_gates, token_weights
from meteora_core.training.run_inputs import run_inputs, short_hash, with_order
from meteora_core.training.state import last_loss, saved_states
from meteora_core.training.task_rows import encoded_rows, train_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RIDGE_COMPOSITES = 32
"""Composites beyond what the steps need, for the closed-form start."""

HELD_OUT_COMPOSITES = 24


@dataclass(frozen=True)
class TrainedGates:
    """The outcome of the stage.

    Attributes:
        folder: The checkpoint.
        skipped: It was there already, trained with the same inputs.
        steps, loss, tokens, seconds: Of the training.
        held_out: Measured on train rows that were kept out of training; see :func:`meteora_core.training.gate_metrics.measure_gates`.
        cut: How many rows were cut to the longest length.
        sampled: Per task, how much of it was seen; see :class:`meteora_core.training.state.RunState`.
        memory: Of the GPUs, as there.
    """

    folder: Path
    skipped: bool
    steps: int
    loss: float
    tokens: int
    seconds: float
    held_out: dict[str, float]
    cut: int
    sampled: dict[str, dict[str, float]]
    memory: dict[str, list[int]]


def gate_inputs(
    base: BaseReference,
    dtype: torch.dtype,
    data_dir: Path,
    bank: AdapterBank,
    settings: GateTrainSettings,
    top_k: int,
    temperature: float,
    max_rows: int | None,
    *,
    processes: int = 1,
) -> dict[str, Any]:
    """What fixes a gate run; see :func:`meteora_core.training.run_inputs.run_inputs`."""
    more = {"adapters": {adapter.name: adapter.sha256 for adapter in bank}, "top_k": top_k, "temperature": temperature, "max_rows": max_rows}
    return run_inputs("gates", base, dtype, data_dir, bank.names, settings, processes=processes, **more)


def gates_are_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished checkpoint with the same inputs lies in ``folder``."""
    if not is_regular(folder / CONFIG_FILE):
        return False
    return bool(with_order(read_config(folder)["training"].get("inputs", {})) == inputs)


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: AdapterBank,
    *,
    base: BaseReference,
    data_dir: Path,
    folder: Path,
    settings: GateTrainSettings,
    top_k: int = 2,
    temperature: float = 1.0,
    backend: str = "auto",
    max_rows: int | None = None,
    token_cache: Path | None = None,
    resume: bool = False,
    force: bool = False,
    runtime: Runtime = SINGLE,
    progress: Progress = SILENT,
) -> TrainedGates:
    """Train the gates of a bank on its adapters' tasks, and save a checkpoint that holds only what was trained.

    ``loss = CE_lm + beta * CE_gate`` (MeteoRA, arXiv 2405.13053, section 3.2; beta as in the authors' code): CE_lm over all tokens of prompt
    and response, CE_gate the mean over adapted linears and tokens of CE(gate logits, the sequence's task).

    Extensions of ours, all off by default. ``settings.composite_rows``: a share of the rows are composites, made of the same train rows, whose parts are
    labelled each with its own task. ``settings.trainable`` "gates+adapters": the adapters train along, by CE_lm alone. ``settings.loss_on`` "response":
    CE_lm leaves prompts out. ``settings.answer_share``: answers have that share of CE_gate.

    Args:
        model: The base model; it is left with the trained gates attached.
        tokenizer: Its tokenizer.
        bank: The adapters; each name must be a built dataset in ``data_dir``.
        base: How the base is named in the checkpoint.
        data_dir: Datasets.
        folder: The checkpoint.
        settings: Steps, rates, beta, what trains.
        top_k, temperature, backend: Of the routing while training; the first two are saved as the checkpoint's defaults.
        max_rows: Use only the first so many train rows of each task.
        token_cache: Keep tokenised rows there, and read them from there; None: in memory.
        resume: Go on from a saved state of the same inputs, if there is one.
        force: Train even if the same checkpoint is there.
        runtime: The processes that train together; each calls this function, the main one writes. A model that was sharded is of no use afterwards.
        progress: Where to report.

    Raises:
        DataError: A dataset is missing or broken.
        UsageError: ``folder`` holds something that a checkpoint may not replace, an adapter targets one expert of many, ``resume`` with other inputs
            (the differences are listed), values out of range, or a rate of the adapters' own with DeepSpeed.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    check_names(bank.names, "adapter")
    check_replaceable(folder)
    check_observable(bank.modules, "the training of gates")
    adapter_rate = (settings.adapter_learning_rate or settings.learning_rate) if settings.trainable == "gates+adapters" else settings.learning_rate
    if runtime.kind == "deepspeed" and adapter_rate != settings.learning_rate:
        # its ZeRO 2 (0.19.8) links the optimiser's states after the first of two groups has stepped, and never finds those of the second
        raise UsageError("--launcher deepspeed trains gates and adapters at one rate", hint="leave out --adapter-lr, or use --launcher fsdp")
    dtype = next(model.parameters()).dtype
    inputs = gate_inputs(base, dtype, data_dir, bank, settings, top_k, temperature, max_rows, processes=runtime.world)
    states = folder.parent / f".{folder.name}.states"
    if not force and gates_are_current(folder, inputs):
        tidy(folder, states, is_main=runtime.is_main)
        done = read_config(folder)["training"]
        known = {key: done[key] for key in ("steps", "tokens", "seconds", "held_out")}
        known["loss"] = float("nan") if done.get("loss") is None else done["loss"]
        return TrainedGates(folder, True, **known, cut=done["rows_cut"], sampled=done.get("sampled", {}), memory=done.get("memory", {}))
    with only_writer([folder], is_main=runtime.is_main):
        rows = gate_rows(tokenizer, bank.names, data_dir, settings, max_rows, token_cache=token_cache, processes=runtime.world, progress=progress)
        check_tokens(model, tokenizer, (row.tokens for part in (*rows.train, rows.composites) for row in part))
        start = "zeros" if settings.init == "ridge" else settings.init
        attach(model, bank, top_k=top_k, temperature=temperature, backend=backend, init=start, seed=settings.seed, dropout=settings.dropout)
        pad = padding_token(model, tokenizer)
        if not resume and runtime.is_main:
            shutil.rmtree(states, ignore_errors=True)
        runtime.wait()

        def measure(run: Run | None = None, bars: Progress = SILENT) -> dict[str, float]:
            return measure_gates(
                model,
                rows.held_out,
                pad,
                bank.names,
                settings.batch_size,
                composites=rows.held_out_composites,
                response_only=settings.loss_on == "response",
                runtime=runtime,
                run=run,
                progress=bars,
            )

        def evaluate(run: Run) -> dict[str, float]:
            measured = measure(run)
            return {**measured, "loss": measured["lm_loss"] + settings.beta * measured["gate_loss"]} if measured else {}

        try:
            if settings.init == "ridge" and not saved_states(states):
                ridge_start(model, rows.train, pad, settings, composites=rows.composites, processes=runtime.world, progress=progress)
            trainable_in_float32(model, settings.trainable)
            if settings.gradient_checkpointing:
                enable_checkpointing(model)
            run = Task(
                model,
                rows.train,
                GateObjective(settings.beta, alone=settings.trainable == "gates+adapters", answer_share=settings.answer_share),
                pad,
                states,
                inputs,
                "gates",
                names=bank.names,
                response_only=settings.loss_on == "response",
                balanced=settings.sampling == "balanced",
                extra=rows.composites,
                extra_share=settings.composite_rows,
                evaluate=evaluate,
                log_dir=folder.parent / "tensorboard" / folder.name,
                rate=lambda name: adapter_rate / settings.learning_rate if name.endswith(("lora_A", "lora_B")) else 1.0,
            )
            state = train(run, settings, resume=resume, runtime=runtime, progress=progress)
        except BaseException:
            detach(model)
            raise
        finally:
            if settings.gradient_checkpointing:
                disable_checkpointing(model)
        measured = measure(runtime.run, progress)
        gather_trained(model)
        if state.step:
            routing_state(model).gates = "trained"
        loss = last_loss(state.history)
        training = {"inputs": inputs, "inputs_hash": short_hash(inputs), "steps": state.step, "loss": loss, "tokens": state.tokens}
        training |= {"seconds": state.seconds, "held_out": measured, "rows_cut": rows.cut, "sampled": state.sampled, "history": state.history}
        training |= {"processes": runtime.world, "memory": state.memory} if state.memory else {}
        training |= {"evaluations": state.evaluations, "best_step": state.best_step} if state.evaluations else {}
        kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
        if runtime.is_main:
            save_checkpoint(model, folder, base=base, adapters=settings.trainable == "gates+adapters", dtype=kept, training=training)
            shutil.rmtree(states, ignore_errors=True)
        for _, layer in meteora_layers(model) if runtime.kind in ("none", "ddp") else ():
            for parameter in (layer.gate, layer.lora_A, layer.lora_B):
                parameter.data = parameter.data.to(kept).to(dtype)
        set_trainable(model, "none")
        runtime.wait()
        return TrainedGates(folder, False, state.step, loss, state.tokens, state.seconds, measured, rows.cut, state.sampled, state.memory)


@dataclass(frozen=True)
class GateRows:
    """What gates train on, and what they are measured on.

    Attributes:
        train, held_out: Per adapter.
        composites, held_out_composites: Rows of several adapters.
        cut: How many rows were cut to the longest length.
    """

    train: list[Sequence[TrainRow]]
    held_out: list[list[TrainRow]]
    composites: list[TrainRow]
    held_out_composites: list[TrainRow]
    cut: int


def gate_rows(
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, ...],
    data_dir: Path,
    settings: GateTrainSettings,
    max_rows: int | None,
    *,
    token_cache: Path | None = None,
    processes: int = 1,
    progress: Progress = SILENT,
) -> GateRows:
    """Read and tokenise the datasets of all adapters, and make composites of them if the settings say so. Raises DataError, UsageError."""
    source: dict[str, Any] = {"max_length": settings.max_length, "seed": settings.seed, "max_rows": max_rows, "token_cache": token_cache}
    parts = [encoded_rows(data_dir, name, tokenizer, index, **source, progress=progress) for index, name in enumerate(names)]
    encoded, held = [each for each, _ in parts], [rows for _, rows in parts]
    composites, held_composites, cut = [], [], sum(each.cut for each in encoded)
    if settings.composite_rows:
        train_parts, held_parts = zip(*(train_rows(data_dir, name, settings.seed, max_rows) for name in names), strict=True)
        needed = math.ceil(settings.composite_rows * settings.max_steps * settings.accumulation * settings.batch_size * processes) + RIDGE_COMPOSITES
        options: dict[str, Any] = {"largest": settings.composite_max, "max_length": settings.max_length, "seed": settings.seed}
        made = make_composites(train_parts, tokenizer, count=min(POOL, needed), **options)
        composites, cut = list(made.rows), cut + made.cut
        if all(held_parts):
            held_composites = list(make_composites(held_parts, tokenizer, count=HELD_OUT_COMPOSITES, **options).rows)
    return GateRows([each.rows for each in encoded], held, composites, held_composites, cut)


def gather_trained(model: nn.Module) -> None:
    """Replace what trained and is sharded by whole tensors, so that it can be saved; every process must call this."""
    for _, layer in meteora_layers(model):
        for name in ("gate", "lora_A", "lora_B"):
            parameter = getattr(layer, name)
            if (parameter.requires_grad and hasattr(parameter, "full_tensor")) or is_zero(parameter):
                layer._parameters[name] = nn.Parameter(full_tensor(parameter))


def ridge_start(
    model: nn.Module,
    rows: Sequence[Sequence[TrainRow]],
    pad_token: int,
    settings: GateTrainSettings,
    *,
    composites: Sequence[TrainRow] = (),
    processes: int = 1,
    progress: Progress = SILENT,
) -> int:
    """Set the gates by :func:`meteora_core.training.ridge.ridge_gates` on about ``settings.ridge_tokens`` train tokens; return how many.

    Every process looks at the same rows, a global batch at a time.
    """
    lengths = [row_lengths(task_rows) for task_rows in rows]
    mean = sum(map(sum, lengths)) / sum(map(len, lengths))
    count = max(1, round(settings.ridge_tokens / (mean * settings.batch_size * processes)))
    device = next(model.parameters()).device
    extra: dict[str, Any] = {"extra": [len(row) for row in composites], "extra_share": settings.composite_rows if composites else 0.0}
    plan = plan_batches(lengths, count, settings.batch_size * processes, settings.seed, **extra)
    every = [*rows, composites]
    weights = token_weights((every[task][row] for picks in plan for task, row in picks), len(rows), settings.answer_share)
    batches = (collate([every[task][row] for task, row in picks], pad_token).to(device) for picks in plan)
    return ridge_gates(model, batches, count, weights, progress=progress)


def trainable_in_float32(model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Mark what trains and make it float32 (a 16-bit optimiser step is lost to rounding); return it by name."""
    set_trainable(model, what)  # type: ignore[arg-type]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return parameters


class GateObjective:
    """``CE_lm + beta * CE_gate`` and its backward pass.

    Args:
        beta: Weight of the gate loss.
        alone: The gate loss trains each layer's own gate alone, not the adapters before it.
        answer_share: Share of CE_gate that the answers' tokens of a step have together; None: every token weighs the same.
    """

    def __init__(self, beta: float, *, alone: bool = False, answer_share: float | None = None) -> None:
        self.beta, self.alone, self.answer_share = beta, alone, answer_share

    def around(self, model: nn.Module, batch: Batch) -> AbstractContextManager[GateObservations]:
        """Label the gates for forward and backward pass."""
        return routing_state(model).label_gates(batch.gate_labels, keep_hits=True, alone=self.alone)

    def weights(self, batch: Batch, counts: Counts) -> torch.Tensor | None:
        """What each position weighs in CE_gate, float32 (positions,), with a mean of 1 over the step; None is 1 everywhere."""
        answers, every = counts.answer_labels, counts.gate_labels
        if self.answer_share is None or not 0 < answers < every:
            return None
        of_answers, of_prompts = self.answer_share * every / answers, (1 - self.answer_share) * every / (every - answers)
        return torch.where(batch.response.reshape(-1), of_answers, of_prompts)

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """The forward pass, within :meth:`around`."""
        state = routing_state(model)
        observed = state.observations
        assert observed is not None
        observed.weights = self.weights(batch, counts)
        lm_sum, losses = lm_losses(model, batch)
        lm = lm_sum / counts.targets
        gate = observed.mean_loss(counts.gate_labels)
        hits = hit_sum(observed.hits, batch.gate_labels.reshape(-1) != IGNORE) / counts.gate_labels
        parts = {"lm": lm.detach(), "gate": gate.detach(), "accuracy": hits}
        return lm + self.beta * gate, parts, gate_tallies(observed, batch, losses, state.names)

    def __call__(self, model: nn.Module, batch: Batch, counts: Counts) -> StepLoss:
        """Forward and backward pass on one process."""
        with self.around(model, batch), without_cudnn_attention():
            loss, parts, tallies = self.compute(model, batch, counts)
            loss.backward()  # type: ignore[no-untyped-call]
        return StepLoss(loss.detach(), parts, tallies)


def check_pairs(bank_names: tuple[str, ...], datasets: list[str]) -> None:
    """Raise UsageError that lists adapters without a dataset."""
    missing = [name for name in bank_names if name not in datasets]
    if missing:
        raise UsageError(f"no dataset for: {', '.join(missing)}", hint=f"run {', then '.join(f'`{command}`' for command in build_commands(missing))}")
