"""Stage "gates": the gate of every adapted layer learns to choose the adapter for each token; the adapters may be trained too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.checkpoints.native import check_replaceable, save_checkpoint
from meteora_core.checkpoints.native_config import CONFIG_FILE, read_config
from meteora_core.data.frames import INST, pick_frame
from meteora_core.data.rows import build_commands
from meteora_core.errors import UsageError
from meteora_core.model.attach import attach, detach, meteora_layers, set_trainable
from meteora_core.model.sharded import full_tensor, is_zero
from meteora_core.model.tokens import check_observable
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.names import check_names
from meteora_core.reading import is_regular
from meteora_core.routing import meteora_of
from meteora_core.settings import GateTrainSettings
from meteora_core.training.batch_plan import RowMix, plan_batches
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.distributed import OnModel
from meteora_core.training.encoding import row_lengths
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.gate_rows import GateRows, gate_rows, name_of_mixed
from meteora_core.training.job import Trained, TrainJob
from meteora_core.training.loop import TrainingRun, train
from meteora_core.training.output_folders import only_writer, tidy
from meteora_core.training.prompt_frames import choose_frame, with_frames
from meteora_core.training.ridge import RidgeOptions, ridge_gates
from meteora_core.training.run_inputs import run_inputs, short_hash, with_order
from meteora_core.training.state import RunState, last_loss, loss_parts, saved_states
from meteora_core.training.task_rows import HeldOut
from meteora_core.training.trackers import check_tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedGates(Trained):
    """Result of the stage: the attributes of :class:`meteora_core.training.job.Trained`, and those of gates.

    Attributes:
        held_out: Figures on train rows that were kept out of training; see :func:`meteora_core.training.gate_metrics.measure_gates`.
        sampled: Per task, the rows and tokens that were drawn; see :class:`meteora_core.training.state.RunState`.
        memory: GPU memory of each process in bytes, at the start and at the peak; see :class:`meteora_core.training.state.RunState`.
        parts: The parts of the last logged loss: ``lm``, ``gate`` (not multiplied by beta) and ``accuracy`` (top-1, on the training tokens).
    """

    held_out: dict[str, float]
    sampled: dict[str, dict[str, float]]
    memory: dict[str, list[int]]
    parts: dict[str, float] = field(default_factory=dict)


def gate_inputs(
    job: TrainJob, dtype: torch.dtype, bank: AdapterBank, settings: GateTrainSettings, top_k: int = 2, routing_temperature: float = 1.0
) -> dict[str, Any]:
    """What fixes a gate run; see :func:`meteora_core.training.run_inputs.run_inputs`."""
    more = {"adapters": {adapter.name: adapter.sha256 for adapter in bank}, "top_k": top_k, "temperature": routing_temperature}
    return run_inputs("gates", job, dtype, bank.names, settings, more)


def gates_are_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether ``folder`` holds a finished checkpoint that was trained with the same inputs."""
    if not is_regular(folder / CONFIG_FILE):
        return False
    return bool(with_order(read_config(folder)["training"].get("inputs", {})) == inputs)


def finished_gates(folder: Path) -> TrainedGates:
    """The outcome of gates that were trained before, from their checkpoint."""
    done = read_config(folder)["training"]
    loss = float("nan") if done.get("loss") is None else done["loss"]
    sampled, memory, parts = done.get("sampled", {}), done.get("memory", {}), loss_parts(done.get("history", []))
    return TrainedGates(folder, True, done["steps"], loss, done["tokens"], done["seconds"], done["rows_cut"], done["held_out"], sampled, memory, parts)


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: AdapterBank,
    settings: GateTrainSettings,
    job: TrainJob,
    *,
    top_k: int = 2,
    routing_temperature: float = 1.0,
    backend: str = "auto",
) -> TrainedGates:
    """Train the gates of a bank on its adapters' tasks, and save a checkpoint that holds only what was trained.

    ``loss = CE_lm + beta * CE_gate`` (MeteoRA, arXiv 2405.13053, section 3.2; beta as in the authors' code): CE_lm over all tokens of prompt
    and response, CE_gate the mean over adapted layers and tokens of CE(gate logits, the sequence's task).

    Meteora extends this with six settings, all off by default:

    * ``settings.composite_rows``: this share of the rows are composites of the same train rows; each part is labelled with its own task.
    * ``settings.joined_rows``: this share of the sequences consist of complete rows of different tasks, one after another.
    * ``settings.trainable="gates+adapters"``: the adapters are trained too, by CE_lm alone.
    * ``settings.loss_on="response"``: CE_lm leaves out the prompts.
    * ``settings.loss_balance="tasks"``: every task has the same weight in CE_lm, however long its answers are.
    * ``settings.answer_share``: the response tokens have this share of the weight in CE_gate.

    Args:
        model: The base model; afterwards it has the trained gates attached. A sharded model cannot be used afterwards.
        tokenizer: The base model's tokenizer.
        bank: The adapters; the name of each must be a built dataset in ``job.data_dir``.
        settings: Steps, learning rates, beta, and the parts of the model that are trained.
        job: Datasets, the checkpoint's folder (``job.out``), processes.
        top_k: Number of adapters per token and layer; saved as the checkpoint's default.
        routing_temperature: Routing temperature, which divides the gate logits before the softmax; saved as the checkpoint's default.
        backend: Backend of the sum over adapters during training.

    Raises:
        DataError: A dataset is missing or broken.
        UsageError: ``job.out`` contains files that a checkpoint may not replace, an adapter targets single experts of a mixture of experts, ``job.resume``
            is set and the saved state has other inputs (the differences are listed), a value is out of range, or the adapters have their own learning
            rate with DeepSpeed.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    _check_job(bank, settings, job)
    if job.template is not None:
        pick_frame(job.template, INST, tokenizer)  # raises an error for a wrong template before the training starts
    dtype = next(model.parameters()).dtype
    inputs = gate_inputs(job, dtype, bank, settings, top_k, routing_temperature)
    states = job.out.parent / f".{job.out.name}.states"
    if not job.force and gates_are_current(job.out, inputs):
        tidy(job.out, states, is_main=job.runtime.is_main)
        return finished_gates(job.out)
    with only_writer([job.out], is_main=job.runtime.is_main):
        rows = gate_rows(tokenizer, bank.names, settings, job)
        check_tokens(model, tokenizer, (row.tokens for part in (*rows.train, rows.mixed) for row in part))
        start = "zeros" if settings.init == "ridge" else settings.init
        bank = with_frames(bank, job)
        attach(model, bank, top_k=top_k, temperature=routing_temperature, backend=backend, init=start, seed=settings.seed, dropout=settings.dropout)
        stage = _GateStage(model, dtype, rows, padding_token(model, tokenizer), settings, job, inputs, states)
        state = stage.start_and_train()
        measured = measure_gates(model, stage.held_out, runtime=job.runtime, on_model=job.runtime.run, progress=job.progress)
        meteora_of(model).provenance.frame, tried = choose_frame(model, tokenizer, stage.held_out, settings, job)
        gather_trained(model)
        stage.save(state, measured, tried)
        set_trainable(model, "none")
        job.runtime.wait()
    loss, parts = last_loss(state.history), loss_parts(state.history)
    return TrainedGates(job.out, False, state.step, loss, state.tokens, state.seconds, rows.cut, measured, state.sampled, state.memory, parts)


def _check_job(bank: AdapterBank, settings: GateTrainSettings, job: TrainJob) -> None:
    """Raise UsageError for gates that cannot be trained or saved, before any row is read."""
    check_names(bank.names, "adapter")
    check_replaceable(job.out)
    check_observable(bank.modules, "the training of gates")
    check_tracker(settings.log_to)
    if job.runtime.kind == "deepspeed" and _adapter_rate(settings) != 1.0:
        # DeepSpeed's ZeRO 2 (0.19.8) links the optimiser states after the step of the first parameter group and does not find those of the second.
        raise UsageError("--launcher deepspeed trains gates and adapters at one rate", hint="leave out --adapter-lr, or use --launcher fsdp")


def _adapter_rate(settings: GateTrainSettings) -> float:
    """The adapters' learning rate as a multiple of the gates'."""
    if settings.trainable != "gates+adapters" or settings.adapter_learning_rate is None:
        return 1.0
    return settings.adapter_learning_rate / settings.learning_rate


@dataclass(frozen=True)
class _GateStage:
    """The training of gates in a model with attached adapters.

    Attributes:
        model: The base model with the adapters attached.
        dtype: The base model's number type.
        rows: Train and held-out rows.
        pad_token: Token id of the padding.
        settings: Steps, learning rates, beta, and the parts of the model that are trained.
        job: Datasets, the checkpoint's folder, processes.
        inputs: Inputs that determine the run; see :func:`meteora_core.training.run_inputs.run_inputs`.
        states: Folder of the resumable states.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    rows: GateRows
    pad_token: int
    settings: GateTrainSettings
    job: TrainJob
    inputs: dict[str, Any]
    states: Path

    @property
    def held_out(self) -> HeldOut:
        """The rows that the gates are measured on."""
        names, size = meteora_of(self.model).names, self.settings.batch_size
        return HeldOut(self.rows.held_out, names, self.pad_token, size, self.rows.held_out_composites, self.settings.loss_on == "response")

    def start_and_train(self) -> RunState:
        """Initialise the gates, then run the optimiser steps. If either fails, the adapters are detached from the model."""
        model, settings, job = self.model, self.settings, self.job
        if not job.resume and job.runtime.is_main:
            shutil.rmtree(self.states, ignore_errors=True)
        job.runtime.wait()
        try:
            if settings.init == "ridge" and not saved_states(self.states):
                ridge_start(model, self.rows, self.pad_token, settings, job)
            trainable_in_float32(model, settings.trainable)
            if settings.gradient_checkpointing:
                enable_checkpointing(model)
            return train(self._run(), settings, resume=job.resume, runtime=job.runtime, progress=job.progress)
        except BaseException:
            detach(model)
            raise
        finally:
            if settings.gradient_checkpointing:
                disable_checkpointing(model)

    def _run(self) -> TrainingRun:
        settings, held_out, rate = self.settings, self.held_out, _adapter_rate(self.settings)

        def evaluate(on_model: OnModel) -> dict[str, float]:
            measured = measure_gates(self.model, held_out, runtime=self.job.runtime, on_model=on_model)
            return {**measured, "loss": measured["lm_loss"] + settings.beta * measured["gate_loss"]} if measured else {}

        return TrainingRun(
            self.model,
            self.rows.train,
            GateObjective(settings.beta, alone=settings.trainable == "gates+adapters", answer_share=settings.answer_share, balance=settings.loss_balance),
            self.pad_token,
            self.states,
            self.inputs,
            "gates",
            names=tuple(held_out.names),
            response_only=held_out.response_only,
            balanced=settings.sampling == "balanced",
            extra=self.rows.mixed,
            extra_share=settings.composite_rows + settings.joined_rows,
            extra_name=name_of_mixed(settings),
            evaluate=evaluate,
            log_dir=self.job.out.parent / "tensorboard" / self.job.out.name,
            rate=lambda name: rate if name.endswith(("lora_A", "lora_B")) else 1.0,
        )

    def save(self, state: RunState, measured: Mapping[str, float], frames: Mapping[str, float]) -> None:
        """Write the checkpoint with the record of its training (in the main process), and round the model's weights as in the saved checkpoint."""
        runtime, saved_dtype = self.job.runtime, torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        if state.step:
            meteora_of(self.model).gates = "trained"
        record = {"inputs": self.inputs, "inputs_hash": short_hash(self.inputs), "steps": state.step, "loss": last_loss(state.history)}
        record |= {"tokens": state.tokens, "seconds": state.seconds, "held_out": measured, "rows_cut": self.rows.cut}
        record |= {"sampled": state.sampled, "history": state.history}
        record |= {"frames": dict(frames)} if frames else {}
        record |= {"processes": runtime.world, "memory": state.memory} if state.memory else {}
        record |= {"evaluations": state.evaluations, "best_step": state.best_step} if state.evaluations else {}
        if runtime.is_main:
            adapters = self.settings.trainable == "gates+adapters"
            save_checkpoint(self.model, self.job.out, base=self.job.base, adapters=adapters, dtype=saved_dtype, training=record)
            shutil.rmtree(self.states, ignore_errors=True)
        for _, layer in meteora_layers(self.model) if runtime.kind in ("none", "ddp") else ():
            for parameter in (layer.gate, layer.lora_A, layer.lora_B):
                parameter.data = parameter.data.to(saved_dtype).to(self.dtype)


def gather_trained(model: nn.Module) -> None:
    """Replace trained parameters that are sharded with whole tensors, so that they can be saved. Every process must call this function."""
    for _, layer in meteora_layers(model):
        for name in ("gate", "lora_A", "lora_B"):
            parameter = getattr(layer, name)
            if (parameter.requires_grad and hasattr(parameter, "full_tensor")) or is_zero(parameter):
                layer._parameters[name] = nn.Parameter(full_tensor(parameter))


def ridge_start(model: nn.Module, rows: GateRows, pad_token: int, settings: GateTrainSettings, job: TrainJob) -> int:
    """Set the gates by :func:`meteora_core.training.ridge.ridge_gates` on about ``settings.ridge_tokens`` train tokens; return the number of tokens.

    Every process runs the same rows, one global batch at a time.
    """
    lengths = [row_lengths(task_rows) for task_rows in rows.train]
    mean = sum(map(sum, lengths)) / sum(map(len, lengths))
    size = settings.batch_size * job.runtime.world
    count = max(1, round(settings.ridge_tokens / (mean * size)))
    mix = RowMix([len(row) for row in rows.mixed], settings.composite_rows + settings.joined_rows)
    every = [*rows.train, rows.mixed]
    batches = [[every[task][row] for task, row in picks] for picks in plan_batches(lengths, count, size, settings.seed, mix)]
    return ridge_gates(model, batches, pad_token, RidgeOptions(settings.answer_share), progress=job.progress)


def trainable_in_float32(model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Mark the trained parameters and convert them to float32, because rounding would lose 16-bit optimiser steps; return them by name."""
    set_trainable(model, what)  # type: ignore[arg-type]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return parameters


def check_pairs(bank_names: tuple[str, ...], datasets: list[str]) -> None:
    """Raise UsageError if adapters have no dataset; the message lists them."""
    missing = [name for name in bank_names if name not in datasets]
    if missing:
        raise UsageError(f"no dataset for: {', '.join(missing)}", hint=f"run {', then '.join(f'`{command}`' for command in build_commands(missing))}")
