"""Stage "gates": the gate of every linear learns which adapter each token wants; the adapters may train along."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.checkpoints.native import CONFIG_FILE, save_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import read_json
from meteora_core.model.attach import attach, detach, meteora_layers, set_trainable
from meteora_core.model.base import BaseReference
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE, routing_state
from meteora_core.settings import GateTrainSettings
from meteora_core.training.common import disable_checkpointing, enable_checkpointing, run_inputs, short_hash, train_rows
from meteora_core.training.loop import Counts, StepLoss, Task, train
from meteora_core.training.loss import lm_loss_sum
from meteora_core.training.plan import plan_batches
from meteora_core.training.ridge import ridge_gates
from meteora_core.training.rows import Batch, TrainRow, collate, encode_rows
from meteora_core.training.state import saved_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedGates:
    """The outcome of the stage.

    Attributes:
        folder: The checkpoint.
        skipped: It was there already, trained with the same inputs.
        steps, loss, tokens, seconds: Of the training.
        held_out: Measured on train rows that were kept out of training: ``gate_accuracy`` (top-1, response tokens, all decoder layers but
            the first), ``gate_accuracy_all`` (all tokens and layers), ``gate_loss``, ``lm_loss``, and per task ``gate_accuracy/<task>``.
        cut: How many rows were cut to the longest length.
    """

    folder: Path
    skipped: bool
    steps: int
    loss: float
    tokens: int
    seconds: float
    held_out: dict[str, float]
    cut: int


def gate_inputs(
    base: BaseReference,
    dtype: torch.dtype,
    data_dir: Path,
    bank: AdapterBank,
    settings: GateTrainSettings,
    top_k: int,
    temperature: float,
    max_rows: int | None,
) -> dict[str, Any]:
    """What fixes a gate run; see :func:`meteora_core.training.common.run_inputs`."""
    hashes = {adapter.name: adapter.sha256 for adapter in bank}
    return run_inputs("gates", base, dtype, data_dir, bank.names, settings, adapters=hashes, top_k=top_k, temperature=temperature, max_rows=max_rows)


def gates_are_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished checkpoint with the same inputs lies in ``folder``."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    return bool(read_json(folder / CONFIG_FILE, error=CheckpointError).get("training", {}).get("inputs") == inputs)


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
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> TrainedGates:
    """Train the gates of a bank on its adapters' tasks, and save a checkpoint that holds only what was trained.

    ``loss = CE_lm + beta * CE_gate`` (MeteoRA, arXiv 2405.13053, section 3.2; beta as in the authors' code): CE_lm over all tokens of prompt
    and response, CE_gate the mean over adapted linears and tokens of CE(gate logits, the sequence's task).

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
        resume: Go on from a saved state of the same inputs, if there is one.
        force: Train even if the same checkpoint is there.
        progress: Where to report.

    Raises:
        DataError: A dataset is missing or broken.
        UsageError: ``resume`` with other inputs (the differences are listed), or values out of range.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    dtype = next(model.parameters()).dtype
    inputs = gate_inputs(base, dtype, data_dir, bank, settings, top_k, temperature, max_rows)
    if not force and gates_are_current(folder, inputs):
        done = read_json(folder / CONFIG_FILE)["training"]
        return TrainedGates(folder, True, done["steps"], done["loss"], done["tokens"], done["seconds"], done["held_out"], done["rows_cut"])
    rows, held_out, cut = [], [], 0
    for index, name in enumerate(bank.names):
        train_part, held_part = train_rows(data_dir, name, settings.seed, max_rows)
        encoded = encode_rows(train_part, tokenizer, index, settings.max_length)
        rows.append(encoded.rows)
        cut += encoded.cut
        held_out.append(encode_rows(held_part, tokenizer, index, settings.max_length).rows if held_part else [])
    start = "zeros" if settings.init == "ridge" else settings.init
    attach(model, bank, top_k=top_k, temperature=temperature, backend=backend, init=start, seed=settings.seed, dropout=settings.dropout)
    states, pad = folder.parent / f".{folder.name}.states", int(tokenizer.pad_token_id)
    if not resume:
        shutil.rmtree(states, ignore_errors=True)
    try:
        if settings.init == "ridge" and not saved_states(states):
            ridge_start(model, rows, pad, settings, progress=progress)
        parameters = trainable_in_float32(model, settings.trainable)
        if settings.gradient_checkpointing:
            enable_checkpointing(model)
        run = Task(model, parameters, rows, GateObjective(settings.beta), pad, states, inputs, "gates")
        state = train(run, settings, resume=resume, progress=progress)
    except BaseException:
        detach(model)
        raise
    finally:
        if settings.gradient_checkpointing:
            disable_checkpointing(model)
    measured = measure_gates(model, held_out, pad, bank.names, settings.batch_size, progress=progress)
    loss = state.history[-1]["loss"] if state.history else float("nan")
    training = {"inputs": inputs, "inputs_hash": short_hash(inputs), "steps": state.step, "loss": loss, "tokens": state.tokens}
    training |= {"seconds": state.seconds, "held_out": measured, "rows_cut": cut, "history": state.history}
    kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
    save_checkpoint(model, folder, base=base, adapters=settings.trainable == "gates+adapters", dtype=kept, training=training)
    for _, layer in meteora_layers(model):
        for parameter in (layer.gate, layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.to(kept).to(dtype)
    set_trainable(model, "none")
    shutil.rmtree(states, ignore_errors=True)
    return TrainedGates(folder, False, state.step, loss, state.tokens, state.seconds, measured, cut)


def ridge_start(
    model: nn.Module, rows: list[list[TrainRow]], pad_token: int, settings: GateTrainSettings, *, progress: Progress = SILENT
) -> int:
    """Set the gates by :func:`meteora_core.training.ridge.ridge_gates` on about ``settings.ridge_tokens`` train tokens; return how many."""
    lengths = [[len(row) for row in task_rows] for task_rows in rows]
    mean = sum(map(sum, lengths)) / sum(map(len, lengths))
    count = max(1, round(settings.ridge_tokens / (mean * settings.batch_size)))
    device = next(model.parameters()).device
    plan = plan_batches(lengths, count, settings.batch_size, settings.seed)
    batches = (collate([rows[task][row] for task, row in picks], pad_token).to(device) for picks in plan)
    return ridge_gates(model, batches, count, progress=progress)


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
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, model: nn.Module, batch: Batch, counts: Counts) -> StepLoss:
        state = routing_state(model)
        with state.label_gates(batch.gate_labels, keep_hits=True) as observed:
            lm = lm_loss_sum(model, batch) / counts.targets
            gate = observed.mean_loss(counts.gate_labels)
            hits = hit_sum(observed.hits, batch.gate_labels.reshape(-1) != IGNORE) / counts.gate_labels
            loss = lm + self.beta * gate
            loss.backward()  # type: ignore[no-untyped-call]
        return StepLoss(loss.detach(), {"lm": lm.detach(), "gate": gate.detach(), "accuracy": hits})


def hit_sum(hits: dict[str, Tensor], where: Tensor) -> Tensor:
    """Positions of ``where`` whose top-1 adapter was right, averaged over layers: a float32 scalar."""
    return torch.stack([layer & where for layer in hits.values()]).sum().float() / len(hits)


@torch.no_grad()
def measure_gates(
    model: nn.Module, rows: list[list[TrainRow]], pad_token: int, names: tuple[str, ...], batch_size: int, *, progress: Progress = SILENT
) -> dict[str, float]:
    """Gate loss and top-1 accuracy on held-out rows; see :class:`TrainedGates`."""
    state = routing_state(model)
    model.eval()
    device = next(model.parameters()).device
    sums = dict.fromkeys(("lm", "gate", "all", "response"), 0.0)
    counts = dict.fromkeys(("targets", "labels", "response"), 0)
    measured: dict[str, float] = {}
    with progress.task("measuring gates on held-out rows", total=sum(map(len, rows)), unit="rows") as bar:
        for name, task_rows in zip(names, rows, strict=True):
            right = seen = 0.0
            ordered = sorted(task_rows, key=len)
            for start in range(0, len(ordered), batch_size):
                batch = collate(ordered[start : start + batch_size], pad_token).to(device)
                with state.label_gates(batch.gate_labels, keep_hits=True) as observed:
                    sums["lm"] += float(lm_loss_sum(model, batch))
                labelled = batch.gate_labels.reshape(-1) != IGNORE
                response = batch.response.reshape(-1) & labelled
                later = {path: hits for path, hits in observed.hits.items() if not is_first_layer(path)}
                right += float(hit_sum(later or observed.hits, response))
                seen += int(response.sum())
                sums["gate"] += float(torch.stack(observed.loss_sums).mean())
                sums["all"] += float(hit_sum(observed.hits, labelled))
                counts["targets"] += int((batch.targets != IGNORE).sum())
                counts["labels"] += int(labelled.sum())
                bar.update(len(batch.input_ids))
            if seen:
                measured[f"gate_accuracy/{name}"] = right / seen
            sums["response"] += right
            counts["response"] += int(seen)
    if not counts["response"]:
        return {}
    return {
        "gate_accuracy": sums["response"] / counts["response"],
        "gate_accuracy_all": sums["all"] / counts["labels"],
        "gate_loss": sums["gate"] / counts["labels"],
        "lm_loss": sums["lm"] / counts["targets"],
        **measured,
    }


def is_first_layer(path: str) -> bool:
    """Whether a linear belongs to decoder layer 0, whose q, k and v see one token without context."""
    return any(part == "0" for part in path.split("."))


def check_pairs(bank_names: tuple[str, ...], datasets: list[str]) -> None:
    """Raise UsageError that lists adapters without a dataset."""
    missing = [name for name in bank_names if name not in datasets]
    if missing:
        raise UsageError(f"no dataset for: {', '.join(missing)}", hint=f"meteora data build --task {','.join(missing)}")
