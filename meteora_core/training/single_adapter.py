"""Stage "adapters": one ordinary PEFT LoRA per task, on all linear layers of the base model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.folders import INFO_FILE, read_training_info
from meteora_core.adapters.peft_folder import CONFIG, WEIGHTS
from meteora_core.data.dataset_frames import dataset_frame
from meteora_core.data.frames import Frame
from meteora_core.errors import CheckpointError
from meteora_core.files import atomic_folder
from meteora_core.json_files import read_json, write_json
from meteora_core.model.base import BaseReference
from meteora_core.model.sharded import full_tensor
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.names import check_names, folder_of
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.checkpointing import disable_checkpointing, enable_checkpointing
from meteora_core.training.encoding import Batch, Encoded
from meteora_core.training.job import Trained, TrainJob
from meteora_core.training.lm_metrics import lm_tallies, measure_lm
from meteora_core.training.loop import Computed, Counts, TrainingRun, train
from meteora_core.training.loss import lm_losses
from meteora_core.training.output_folders import check_adapter_folder, only_writer, tidy
from meteora_core.training.run_inputs import run_inputs, with_order
from meteora_core.training.state import INFO, RunState, differences, last_loss, saved_states
from meteora_core.training.task_rows import HeldOut, encoded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedAdapter(Trained):
    """One trained adapter: the attributes of :class:`meteora_core.training.job.Trained`, and its name.

    Attributes:
        task: Name of the adapter.
    """

    task: str


def adapter_inputs(job: TrainJob, dtype: torch.dtype, task: str, settings: AdapterTrainSettings, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """The inputs that determine an adapter; see :func:`meteora_core.training.run_inputs.run_inputs`.

    ``tasks`` are the datasets of a LoRA that is trained on several tasks.
    """
    return run_inputs("adapters", job, dtype, list(tasks or [task]), settings, {})


def adapter_is_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether ``folder`` holds a finished adapter that was trained with the same inputs."""
    if not (folder / WEIGHTS).is_file() or not (folder / INFO_FILE).is_file():
        return False
    return bool(with_order(read_training_info(folder).inputs) == inputs)


def finished_adapter(task: str, folder: Path) -> TrainedAdapter:
    """The result for an adapter that was trained before, read from its folder."""
    done = read_training_info(folder)
    loss = float("nan") if done.loss is None else done.loss
    return TrainedAdapter(folder, True, done.steps, loss, done.tokens, done.seconds, done.rows_cut, task)


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    settings: AdapterTrainSettings,
    job: TrainJob,
    *,
    tasks: Sequence[str] | None = None,
) -> TrainedAdapter:
    """Train a LoRA on the train rows of one task, or of several tasks in equal parts, and save it as the PEFT folder ``job.out/<task>``.

    The loss is the cross-entropy over all tokens of prompt and response, or of the response only (``settings.loss_on``), including the end-of-sequence
    token. The base model is unchanged afterwards.

    Args:
        model: The base model.
        tokenizer: The base model's tokenizer.
        task: Name of the adapter. Without ``tasks`` it is also the name of a built dataset in ``job.data_dir``.
        settings: Rank, number of steps, learning rate.
        job: Datasets, folder of adapters, processes.
        tasks: Names of several datasets to train one LoRA on (the paper's LoRA-B); the same number of tokens is drawn from every task.

    Raises:
        DataError: The dataset is missing or broken.
        UsageError: A name is invalid, or ``job.out/<task>`` lies outside ``job.out`` or contains files that Meteora did not write.
        StorageError: The folder cannot be written, or (BusyError) another process is training the adapter.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    check_names(tasks or ())
    runtime, folder, dtype = job.runtime, folder_of(job.out, task, "adapter"), next(model.parameters()).dtype
    inputs = adapter_inputs(job, dtype, task, settings, tasks)
    states = job.out / f".{task}.states"
    if not job.force and adapter_is_current(folder, inputs):
        tidy(folder, states, is_main=runtime.is_main)
        return finished_adapter(task, folder)
    check_adapter_folder(folder)
    with only_writer([folder], is_main=runtime.is_main):
        names = tuple(tasks or [task])
        encoded, held_out = adapter_rows(model, tokenizer, names, dict.fromkeys(names, settings), job)
        torch.manual_seed(settings.seed)
        peft_model = with_lora(model, job.base, settings)
        try:
            if settings.gradient_checkpointing:
                enable_checkpointing(model)
            run = TrainingRun(
                peft_model,
                [each.rows for each in encoded],
                LmObjective(dtype, names),
                held_out.pad_token,
                states,
                inputs,
                f"adapter {task}",
                names=names,
                response_only=held_out.response_only,
                evaluate=lambda on_model: measure_lm(peft_model, held_out, runtime=runtime, on_model=on_model),
                log_dir=job.out / "tensorboard" / task,
            )
            state = train_or_start_anew(run, settings, job)
            trained = {name: full_tensor(parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
            cut = sum(each.cut for each in encoded)
            if runtime.is_main:
                frame = dataset_frame(job.data_dir, task) if tasks is None else None
                save_adapter(peft_model, folder, inputs, state, cut, weights=trained, tasks=tasks, frame=frame)
                shutil.rmtree(states, ignore_errors=True)
        finally:
            if settings.gradient_checkpointing:
                disable_checkpointing(model)
            peft_model.unload()
            model.eval().requires_grad_(False)
        runtime.wait()
        return TrainedAdapter(folder, False, state.step, last_loss(state.history), state.tokens, state.seconds, cut, task)


def adapter_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], settings: Mapping[str, AdapterTrainSettings], job: TrainJob
) -> tuple[list[Encoded], HeldOut]:
    """The train rows of each task, labelled with the task's index in ``tasks``, and the held-out rows. Raises DataError.

    Args:
        model, tokenizer: The base model and its tokenizer; the model's vocabulary must contain every token of the rows.
        tasks: Names of the datasets.
        settings: The settings of each task.
        job: Datasets, number of rows, cache.
    """
    parts = [encoded_rows(job, task, tokenizer, index, settings[task]) for index, task in enumerate(tasks)]
    encoded, held = [each for each, _ in parts], [rows for _, rows in parts if rows]
    check_tokens(model, tokenizer, (row.tokens for each in encoded for row in each.rows))
    first = settings[tasks[0]]
    return encoded, HeldOut(held, tasks, padding_token(model, tokenizer), first.batch_size, response_only=first.loss_on == "response")


def train_or_start_anew(run: TrainingRun, settings: AdapterTrainSettings, job: TrainJob) -> RunState:
    """Call :func:`meteora_core.training.loop.train`, after removing saved states that have other inputs or, without ``job.resume``, all saved states."""
    runtime = job.runtime
    states = saved_states(run.folder) if job.resume else []
    other = bool(states) and bool(differences(with_order(read_json(states[-1] / INFO, error=CheckpointError)["inputs"]), run.inputs))
    if other or not job.resume:
        runtime.wait()
        if runtime.is_main:
            shutil.rmtree(run.folder, ignore_errors=True)
        runtime.wait()
    return train(run, settings, resume=job.resume, runtime=runtime, progress=job.progress)


def save_adapter(
    peft_model: Any,
    folder: Path,
    inputs: dict[str, Any],
    state: RunState,
    cut: int,
    *,
    weights: dict[str, Tensor] | None = None,
    tasks: Sequence[str] | None = None,
    frame: Frame | None = None,
) -> None:
    """Write a PEFT folder with a record of the training, atomically.

    Args:
        peft_model: A PEFT model with the adapter's configuration.
        folder: The folder to write.
        inputs: Inputs that determined the run.
        state: The final state of the run.
        cut: Number of rows that were cut to the maximum length.
        weights: The adapter's tensors by parameter name; None takes the tensors of ``peft_model``.
        tasks: Names of the datasets, for a LoRA that was trained on several tasks.
        frame: The prompt frame of the dataset; None if it is not known.
    """
    loss = last_loss(state.history)
    config = peft_model.peft_config["default"]
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the order of a set differs between processes
    with atomic_folder(folder) as temporary:
        peft_model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False, state_dict=weights)
        (temporary / WEIGHTS).chmod(0o644)
        _in_order(temporary / CONFIG)
        info = {"inputs": inputs, "steps": state.step, "loss": loss, "tokens": state.tokens, "seconds": state.seconds, "rows_cut": cut}
        info |= {"tasks": list(tasks)} if tasks else {}
        info |= {"frame": frame.to_json()} if frame else {}
        info |= {"evaluations": state.evaluations, "best_step": state.best_step} if state.evaluations else {}
        write_json(temporary / INFO_FILE, {**info, "history": state.history})


def _in_order(file: Path) -> None:
    """Sort the lists of module names in PEFT's configuration file, because PEFT writes them from sets, whose order differs between processes."""
    config = read_json(file, error=CheckpointError)
    for name, value in config.items():
        if name.endswith("_modules") and isinstance(value, list) and all(isinstance(each, str) for each in value):
            config[name] = sorted(value)
    write_json(file, config)


def with_lora(model: PreTrainedModel, base: BaseReference, settings: AdapterTrainSettings) -> Any:
    """A PEFT model with a newly initialised LoRA on all linear layers, drawn from PyTorch's default generator."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
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
    """The language-model loss. A 16-bit base model computes in its own number type, while the LoRA weights are float32.

    Args:
        dtype: The base model's number type.
        names: Names of the tasks by gate label, for the log.
    """

    def __init__(self, dtype: torch.dtype, names: Sequence[str]) -> None:
        self.dtype, self.names = dtype, names

    def around(self, model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
        """An empty context."""
        return nullcontext()

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """Run the forward pass."""
        with sixteen_bit(batch.input_ids.device, self.dtype):
            total, losses = lm_losses(model, batch)
        return total / counts.targets, {}, lm_tallies(batch, losses, self.names) if len(self.names) > 1 else {}


def sixteen_bit(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to the number type of a 16-bit base model; disabled for float32 and float64."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))
