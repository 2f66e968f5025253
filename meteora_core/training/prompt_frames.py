"""The prompt frames of the adapters, and the choice of a checkpoint's default frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.data.dataset_frames import dataset_frame, reframed, same_text
from meteora_core.data.frames import INST, RAW, Frame, pick_frame
from meteora_core.data.rows import Row
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import meteora_of
from meteora_core.settings import GateTrainSettings
from meteora_core.text import shown
from meteora_core.training.distributed import SINGLE, Runtime
from meteora_core.training.encoding import TrainRow, encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.task_rows import HeldOut, train_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16
"""Maximum number of held-out rows of a task on which frames are compared."""


def with_frames(bank: AdapterBank, job: TrainJob) -> AdapterBank:
    """A bank whose adapters have the prompt frame of their dataset; without one, they keep the frame from their folder. Raises DataError."""
    return replace(bank, adapters=tuple(replace(info, frame=dataset_frame(job.data_dir, info.name) or info.frame) for info in bank.adapters))


def choose_frame(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, settings: GateTrainSettings, job: TrainJob
) -> tuple[Frame | None, dict[str, float]]:
    """Choose the default prompt frame of a model whose gates were trained.

    This is the user's frame (``job.template``), or the frame that all adapters share. If the adapters' frames differ, each is tried on the held-out rows of
    all adapters, and the frame with the highest gate accuracy is chosen. Every process must call this function.

    Args:
        model: Model with the trained gates.
        tokenizer: The base model's tokenizer.
        held_out: Rows that the gates are measured on.
        settings: Settings with the maximum row length and the seed that selects the held-out rows.
        job: Datasets, the user's template, processes.

    Returns:
        The frame (None if no adapter's frame is known), and the gate accuracy with each frame that was tried, by the frame's text.

    Raises:
        UsageError: The user's template is unknown, or the base model has no chat template.
        DataError: A dataset is missing or broken.
    """
    if job.template is not None:
        return pick_frame(job.template, INST, tokenizer), {}

    def held() -> list[list[Row]]:
        return [train_rows(job, info.name, settings.seed)[1][:ROWS] for info in meteora_of(model).adapters]

    return common_or_best(model, tokenizer, held, held_out, FrameTrial(settings.max_length, job.runtime, job.progress))


@dataclass(frozen=True)
class FrameTrial:
    """Parameters of the comparison of prompt frames.

    Attributes:
        max_length: Maximum row length in tokens.
        runtime: The processes; each measures a part of the rows.
        progress: Object that progress is reported to.
    """

    max_length: int
    runtime: Runtime = SINGLE
    progress: Progress = SILENT


def common_or_best(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, held: Callable[[], Sequence[Sequence[Row]]], held_out: HeldOut, trial: FrameTrial
) -> tuple[Frame | None, dict[str, float]]:
    """The frame that all adapters of a model share or, if the frames differ, the one with the highest gate accuracy.

    Args:
        model: Model with attached adapters and their gates.
        tokenizer: The base model's tokenizer.
        held: Function that returns, per adapter, held-out rows in the adapter's own frame; it is called only if frames differ.
        held_out: Parameters of the measurement; its rows are replaced.
        trial: Maximum row length, processes and progress.

    Returns:
        The frame (None if no adapter's frame is known), and the gate accuracy with each frame that was tried, by the frame's text.
    """
    frames = [info.frame for info in meteora_of(model).adapters]
    known = [frame for frame in frames if frame is not None]
    if not known:
        return None, {}
    if all(same_text(frame, known[0]) for frame in known):
        return known[0], {}
    often = Counter((frame.before, frame.after) for frame in known)
    candidates = sorted({(frame.before, frame.after): frame for frame in known}.values(), key=lambda frame: -often[frame.before, frame.after])
    pairs = [[(frame or RAW, row) for row in rows] for frame, rows in zip(frames, held(), strict=True)]
    accuracy = {}
    for candidate in candidates:
        rows = [_encoded(part, candidate, index, tokenizer, trial.max_length) for index, part in enumerate(pairs)]
        on_model = None if trial.runtime is SINGLE else trial.runtime.run
        measured = measure_gates(model, replace(held_out, rows=rows, composites=()), runtime=trial.runtime, on_model=on_model, progress=trial.progress)
        accuracy[candidate.text] = measured.get("gate_accuracy", 0.0)
    best = max(candidates, key=lambda candidate: accuracy[candidate.text])
    others = ", ".join(f"{value:.1%}" for text, value in accuracy.items() if text != best.text)
    trial.progress.note(
        f"the adapters were trained on {len(candidates)} different prompt templates; with {shown(best.text)} for all, the gates choose the right adapter for"
        f" {accuracy[best.text]:.1%} of held-out answer tokens (with the others: {others})"
    )
    return best, accuracy


def _encoded(held: Sequence[tuple[Frame, Row]], frame: Frame, index: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[TrainRow]:
    """The tokenised rows of one adapter, with each row's own frame replaced by ``frame``."""
    rows = [reframed(row, own, frame) for own, row in held]
    return encode_rows(rows, tokenizer, index, max_length, frame.end_id(tokenizer)).rows if rows else []
