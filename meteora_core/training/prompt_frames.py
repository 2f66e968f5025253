"""The frames of the adapters' prompts, and the one that a checkpoint uses when nobody says which."""

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
"""Largest number of held-out rows of a task that frames are compared on."""


def with_frames(bank: AdapterBank, job: TrainJob) -> AdapterBank:
    """A bank whose adapters know the frame of their dataset; without a dataset they keep what their folder told. Raises DataError."""
    return replace(bank, adapters=tuple(replace(info, frame=dataset_frame(job.data_dir, info.name) or info.frame) for info in bank.adapters))


def choose_frame(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, settings: GateTrainSettings, job: TrainJob
) -> tuple[Frame | None, dict[str, float]]:
    """The frame for messages to a model whose gates were trained.

    It is the user's (``job.template``), or the one that all adapters share. Where they differ, each is tried on the held-out rows of all adapters, and the one
    under which the gates choose the right adapter most often is taken.

    Args:
        model: With the trained gates; every process calls this.
        tokenizer: The base model's.
        held_out: What the gates are measured on.
        settings: The longest row, and the seed that chooses the held-out rows.
        job: Datasets, the user's template, processes.

    Returns:
        The frame (None where no adapter's is known), and the accuracy of every frame that was tried, by its text.

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
    """How frames are tried.

    Attributes:
        max_length: Longest row, in tokens.
        runtime: The processes; each of them tries.
        progress: Where progress is reported.
    """

    max_length: int
    runtime: Runtime = SINGLE
    progress: Progress = SILENT


def common_or_best(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, held: Callable[[], Sequence[Sequence[Row]]], held_out: HeldOut, trial: FrameTrial
) -> tuple[Frame | None, dict[str, float]]:
    """The frame that all adapters of a model share; where they differ, the one under which the gates choose the right adapter most often.

    Args:
        model: With its gates.
        tokenizer: The base model's.
        held: Called where frames differ; per adapter, held-out rows in the adapter's own frame.
        held_out: What the gates are measured on; its rows are replaced.
        trial: How frames are tried.

    Returns:
        The frame (None where no adapter's is known), and the accuracy of every frame that was tried, by its text.
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
        measured = measure_gates(model, replace(held_out, rows=rows, composites=()), runtime=trial.runtime, on_model=trial.runtime.run, progress=trial.progress)
        accuracy[candidate.text] = measured.get("gate_accuracy", 0.0)
    best = max(candidates, key=lambda candidate: accuracy[candidate.text])
    others = ", ".join(f"{value:.1%}" for text, value in accuracy.items() if text != best.text)
    trial.progress.note(
        f"the adapters were trained on {len(candidates)} different prompt templates; with {shown(best.text)} for all, the gates choose the right adapter for"
        f" {accuracy[best.text]:.1%} of held-out answer tokens (with the others: {others})"
    )
    return best, accuracy


def _encoded(held: Sequence[tuple[Frame, Row]], frame: Frame, index: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[TrainRow]:
    """Rows of one adapter with their messages in ``frame``, whatever theirs is."""
    rows = [reframed(row, own, frame) for own, row in held]
    return encode_rows(rows, tokenizer, index, max_length, frame.end_id(tokenizer)).rows if rows else []
