"""Stage "adapters": one ordinary PEFT LoRA per task, on all linear layers of the base."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.folders import INFO_FILE, read_training_info
from meteora_core.adapters.peft_folder import CONFIG, WEIGHTS
from meteora_core.errors import CheckpointError
from meteora_core.files import atomic_folder
from meteora_core.json_files import read_json, write_json
from meteora_core.model.base import BaseReference
from meteora_core.model.sharded import full_tensor
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.names import check_names, folder_of
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.distributed import SINGLE, Runtime
from meteora_core.training.encoding import Batch, TrainRow, collate
from meteora_core.training.gate_metrics import by_task
from meteora_core.training.loop import Computed, Counts, Run, Task, train
from meteora_core.training.loss import lm_losses
from meteora_core.training.output_folders import check_adapter_folder, only_writer, tidy
from meteora_core.training.run_inputs import run_inputs, with_order
from meteora_core.training.state import INFO, RunState, differences, last_loss, saved_states
from meteora_core.training.task_rows import encoded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedAdapter:
    """One trained adapter.

    Attributes:
        task, folder: What and where.
        skipped: It was there already, trained with the same inputs.
        steps, loss, tokens, seconds: Of the training.
        cut: How many rows were cut to the longest length.
    """

    task: str
    folder: Path
    skipped: bool
    steps: int
    loss: float
    tokens: int
    seconds: float
    cut: int


def adapter_inputs(
    base: BaseReference,
    dtype: torch.dtype,
    data_dir: Path,
    task: str,
    settings: AdapterTrainSettings,
    max_rows: int | None,
    *,
    tasks: Sequence[str] | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What fixes an adapter's training; see :func:`meteora_core.training.run_inputs.run_inputs`. ``tasks``: of one LoRA over several tasks."""
    return run_inputs("adapters", base, dtype, data_dir, list(tasks or [task]), settings, processes=processes, max_rows=max_rows)


def adapter_is_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished adapter with the same inputs lies in ``folder``."""
    if not (folder / WEIGHTS).is_file() or not (folder / INFO_FILE).is_file():
        return False
    return bool(with_order(read_training_info(folder).inputs) == inputs)


def finished_adapter(task: str, folder: Path) -> TrainedAdapter:
    """What is known of an adapter that is there already."""
    done = read_training_info(folder)
    loss = float("nan") if done.loss is None else done.loss
    return TrainedAdapter(task, folder, True, done.steps, loss, done.tokens, done.seconds, done.rows_cut)


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    base: BaseReference,
    data_dir: Path,
    out_dir: Path,
    settings: AdapterTrainSettings,
    tasks: Sequence[str] | None = None,
    max_rows: int | None = None,
    token_cache: Path | None = None,
    resume: bool = True,
    force: bool = False,
    runtime: Runtime = SINGLE,
    progress: Progress = SILENT,
) -> TrainedAdapter:
    """Train a LoRA on one task's train rows, or on several tasks mixed evenly, and save it as a PEFT folder ``out_dir/<task>``.

    The loss is the cross-entropy over all tokens of prompt and response (or of the response alone, ``settings.loss_on``), the end-of-sequence
    token included. The base is left as it was.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        task: A built dataset in ``data_dir``; with ``tasks`` only the adapter's name.
        base: How the base is named in the adapter's configuration.
        data_dir, out_dir: Datasets and adapters.
        settings: Rank, steps, rates.
        tasks: Train one LoRA on all of these (the paper's LoRA-B): every task has as many tokens as any other.
        max_rows: Use only the first so many train rows.
        token_cache: Keep tokenised rows there, and read them from there; None: in memory.
        resume: Go on from a saved state of the same inputs, if there is one.
        force: Train even if the same adapter is there.
        runtime: The processes that train together; each calls this function, the main one writes.
        progress: Where to report.

    Raises:
        DataError: The dataset is missing or broken.
        UsageError: A name is not a valid name, or ``out_dir/<task>`` leads elsewhere or holds something that Meteora did not train.
        StorageError: It cannot be written, or (BusyError) another process trains it.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    check_names(tasks or ())
    folder, dtype = folder_of(out_dir, task, "adapter"), next(model.parameters()).dtype
    inputs = adapter_inputs(base, dtype, data_dir, task, settings, max_rows, tasks=tasks, processes=runtime.world)
    states = out_dir / f".{task}.states"
    if not force and adapter_is_current(folder, inputs):
        tidy(folder, states, is_main=runtime.is_main)
        return finished_adapter(task, folder)
    check_adapter_folder(folder)
    with only_writer([folder], is_main=runtime.is_main):
        names = list(tasks or [task])
        parts = [
            encoded_rows(
                data_dir,
                name,
                tokenizer,
                index,
                max_length=settings.max_length,
                seed=settings.seed,
                max_rows=max_rows,
                token_cache=token_cache,
                progress=progress,
            )
            for index, name in enumerate(names)
        ]
        encoded, held_out = [each for each, _ in parts], [held for _, held in parts if held]
        check_tokens(model, tokenizer, (row.tokens for each in encoded for row in each.rows))
        pad = padding_token(model, tokenizer)
        torch.manual_seed(settings.seed)
        peft_model = with_lora(model, base, settings)
        try:
            if settings.gradient_checkpointing:
                enable_checkpointing(model)
            response_only = settings.loss_on == "response"
            run = Task(
                peft_model,
                [each.rows for each in encoded],
                LmObjective(dtype, names),
                pad,
                states,
                inputs,
                f"adapter {task}",
                names=tuple(names),
                response_only=response_only,
                evaluate=lambda work: measure_lm(peft_model, held_out, pad, names, settings.batch_size, response_only, runtime=runtime, run=work),
                log_dir=out_dir / "tensorboard" / task,
            )
            state = train_or_start_anew(run, settings, resume=resume, runtime=runtime, progress=progress)
            weights = {name: full_tensor(parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
            loss = last_loss(state.history)
            cut = sum(each.cut for each in encoded)
            if runtime.is_main:
                save_adapter(peft_model, folder, inputs, state, cut, weights=weights, tasks=tasks)
                shutil.rmtree(states, ignore_errors=True)
        finally:
            if settings.gradient_checkpointing:
                disable_checkpointing(model)
            peft_model.unload()
            model.eval().requires_grad_(False)
        runtime.wait()
        return TrainedAdapter(task, folder, False, state.step, loss, state.tokens, state.seconds, cut)


def train_or_start_anew(run: Task, settings: AdapterTrainSettings, *, resume: bool, runtime: Runtime, progress: Progress) -> RunState:
    """:func:`meteora_core.training.loop.train`; a saved state of other inputs is dropped, and without ``resume`` every saved state."""
    states = saved_states(run.folder) if resume else []
    other = bool(states) and bool(differences(with_order(read_json(states[-1] / INFO, error=CheckpointError)["inputs"]), run.inputs))
    if other or not resume:
        runtime.wait()
        if runtime.is_main:
            shutil.rmtree(run.folder, ignore_errors=True)
        runtime.wait()
    return train(run, settings, resume=resume, runtime=runtime, progress=progress)


def save_adapter(
    peft_model: Any,
    folder: Path,
    inputs: dict[str, Any],
    state: RunState,
    cut: int,
    *,
    weights: dict[str, Tensor] | None = None,
    tasks: Sequence[str] | None = None,
) -> None:
    """Write a PEFT folder and how it was made, atomically.

    Args:
        peft_model: With the adapter's configuration.
        folder: Where to.
        inputs, state, cut: Of the training.
        weights: By parameter name; None takes the model's.
        tasks: Of one LoRA over several tasks.
    """
    loss = last_loss(state.history)
    config = peft_model.peft_config["default"]
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # PEFT writes a set in another order in every process
    with atomic_folder(folder) as temporary:
        named = {} if weights is None else {"state_dict": weights}
        peft_model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False, **named)
        (temporary / WEIGHTS).chmod(0o644)
        _in_order(temporary / CONFIG)
        info = {"inputs": inputs, "steps": state.step, "loss": loss, "tokens": state.tokens, "seconds": state.seconds, "rows_cut": cut}
        info |= {"tasks": list(tasks)} if tasks else {}
        info |= {"evaluations": state.evaluations, "best_step": state.best_step} if state.evaluations else {}
        write_json(temporary / INFO_FILE, {**info, "history": state.history})


def _in_order(file: Path) -> None:
    """Write PEFT's configuration anew with its sets of module names sorted, which come in another order in every process."""
    config = read_json(file, error=CheckpointError)
    for name, value in config.items():
        if name.endswith("_modules") and isinstance(value, list) and all(isinstance(each, str) for each in value):
            config[name] = sorted(value)
    write_json(file, config)


def with_lora(model: PreTrainedModel, base: BaseReference, settings: AdapterTrainSettings) -> Any:
    """A PEFT model with a fresh LoRA on all linear layers, drawn from PyTorch's generator."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base.name
    peft_model.peft_config["default"].revision = base.revision
    return peft_model


class LmObjective:
    """The language-model loss; a 16-bit base computes in its own type, while the LoRA weights stay float32.

    Args:
        dtype: Of the base.
        names: The tasks, by gate label, for what is logged.
    """

    def __init__(self, dtype: torch.dtype, names: Sequence[str]) -> None:
        self.dtype, self.names = dtype, names

    def around(self, model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """The forward pass."""
        with sixteen_bit(batch.input_ids.device, self.dtype):
            total, losses = lm_losses(model, batch)
        return total / counts.targets, {}, lm_tallies(batch, losses, self.names) if len(self.names) > 1 else {}


def sixteen_bit(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a 16-bit base's type; nothing for a wider one."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def lm_tallies(batch: Batch, losses: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The language-model loss per task; see :func:`meteora_core.training.gate_metrics.by_task`."""
    return by_task("lm", losses, torch.where(batch.targets.reshape(-1) != IGNORE, batch.gate_labels.reshape(-1), IGNORE), names)


@torch.no_grad()
def measure_lm(
    model: nn.Module,
    rows: Sequence[Sequence[TrainRow]],
    pad_token: int,
    names: Sequence[str],
    batch_size: int,
    response_only: bool,
    *,
    runtime: Runtime = SINGLE,
    run: Run,
    around: Callable[[Batch], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """The language-model loss on held-out rows: ``loss`` over all, ``lm/<task>`` for each of several tasks. Empty without rows.

    ``around`` holds each forward pass.
    """
    ordered = sorted((row for task_rows in rows for row in task_rows), key=len)
    parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    model.eval()
    device = runtime.device or next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    for start in range(0, len(parts), runtime.world):
        mine = start + runtime.rank
        batch = collate(parts[min(mine, len(parts) - 1)], pad_token, response_only=response_only).to(device)
        with around(batch):
            _, losses = run(lambda module, batch=batch: lm_losses(module, batch))  # type: ignore[misc]
        weight = 1.0 if mine < len(parts) else 0.0
        for name, value in lm_tallies(batch, losses, names).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + weight * value
    totals = {name: runtime.total(value).tolist() for name, value in sums.items()}
    counted = sum(count for _, count in totals.values())
    if not counted:
        return {}
    measured = {name: total / count for name, (total, count) in totals.items() if count} if len(names) > 1 else {}
    return {"loss": sum(total for total, _ in totals.values()) / counted, **measured}
