"""Stage "adapters": one ordinary PEFT LoRA per task, on all linear layers of the base."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora_core.adapters.peft_folder import WEIGHTS
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import atomic_folder, read_json, write_json
from meteora_core.model.base import BaseReference
from meteora_core.progress import SILENT, Progress
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.common import disable_checkpointing, enable_checkpointing, run_inputs, train_rows
from meteora_core.training.loop import Counts, StepLoss, Task, train
from meteora_core.training.loss import lm_loss_sum
from meteora_core.training.rows import Batch, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INFO_FILE = "meteora_training.json"


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
    base: BaseReference, dtype: torch.dtype, data_dir: Path, task: str, settings: AdapterTrainSettings, max_rows: int | None
) -> dict[str, Any]:
    """What fixes an adapter's training; see :func:`meteora_core.training.common.run_inputs`."""
    return run_inputs("adapters", base, dtype, data_dir, [task], settings, max_rows=max_rows)


def adapter_is_current(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished adapter with the same inputs lies in ``folder``."""
    return (folder / WEIGHTS).is_file() and (folder / INFO_FILE).is_file() and read_json(folder / INFO_FILE, error=CheckpointError).get("inputs") == inputs


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    base: BaseReference,
    data_dir: Path,
    out_dir: Path,
    settings: AdapterTrainSettings,
    max_rows: int | None = None,
    resume: bool = True,
    force: bool = False,
    progress: Progress = SILENT,
) -> TrainedAdapter:
    """Train a LoRA on one task's train rows and save it as a PEFT folder ``out_dir/<task>``.

    The loss is the cross-entropy over all tokens of prompt and response (or of the response alone, ``settings.loss_on``), the end-of-sequence
    token included. The base is left as it was.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        task: A built dataset in ``data_dir``.
        base: How the base is named in the adapter's configuration.
        data_dir, out_dir: Datasets and adapters.
        settings: Rank, steps, rates.
        max_rows: Use only the first so many train rows.
        resume: Go on from a saved state of the same inputs, if there is one.
        force: Train even if the same adapter is there.
        progress: Where to report.

    Raises:
        DataError: The dataset is missing or broken.
        MeteoraError: The loss is not finite, or memory ran out.
    """
    folder, dtype = out_dir / task, next(model.parameters()).dtype
    inputs = adapter_inputs(base, dtype, data_dir, task, settings, max_rows)
    if not force and adapter_is_current(folder, inputs):
        done = read_json(folder / INFO_FILE)
        return TrainedAdapter(task, folder, True, done["steps"], done["loss"], done["tokens"], done["seconds"], done["rows_cut"])
    rows, _ = train_rows(data_dir, task, settings.seed, max_rows)
    encoded = encode_rows(rows, tokenizer, 0, settings.max_length)
    states = out_dir / f".{task}.states"
    torch.manual_seed(settings.seed)
    peft_model = _with_lora(model, base, settings)
    try:
        if settings.gradient_checkpointing:
            enable_checkpointing(model)
        parameters = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        objective = _Objective(dtype)
        run = Task(
            peft_model,
            parameters,
            [encoded.rows],
            objective,
            int(tokenizer.pad_token_id),
            states,
            inputs,
            f"adapter {task}",
            response_only=settings.loss_on == "response",
        )
        try:
            state = train(run, settings, resume=resume, progress=progress)
        except UsageError:
            shutil.rmtree(states, ignore_errors=True)
            state = train(run, settings, progress=progress)
        loss = state.history[-1]["loss"] if state.history else float("nan")
        with atomic_folder(folder) as temporary:
            peft_model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False)
            (temporary / WEIGHTS).chmod(0o644)
            info = {"inputs": inputs, "steps": state.step, "loss": loss, "tokens": state.tokens, "seconds": state.seconds, "rows_cut": encoded.cut}
            write_json(temporary / INFO_FILE, {**info, "history": state.history})
    finally:
        if settings.gradient_checkpointing:
            disable_checkpointing(model)
        peft_model.unload()
        model.eval().requires_grad_(False)
    shutil.rmtree(states, ignore_errors=True)
    return TrainedAdapter(task, folder, False, state.step, loss, state.tokens, state.seconds, encoded.cut)


def _with_lora(model: PreTrainedModel, base: BaseReference, settings: AdapterTrainSettings) -> Any:
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


class _Objective:
    """The language-model loss; a 16-bit base computes in its own type, while the LoRA weights stay float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, model: nn.Module, batch: Batch, counts: Counts) -> StepLoss:
        with torch.autocast(batch.input_ids.device.type, dtype=self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            loss = lm_loss_sum(model, batch) / counts.targets
        loss.backward()  # type: ignore[no-untyped-call]
        return StepLoss(loss.detach(), {})
