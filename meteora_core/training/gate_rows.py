"""The rows that gates are trained and measured on: each adapter's own task, and composites of several tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from meteora_core.settings import GateTrainSettings
from meteora_core.training.composites import POOL, make_composites
from meteora_core.training.encoding import TrainRow
from meteora_core.training.job import TrainJob
from meteora_core.training.task_rows import encoded_rows, train_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RIDGE_COMPOSITES = 32
"""Number of composites in addition to those of the training steps, for the ridge start."""

HELD_OUT_COMPOSITES = 24


@dataclass(frozen=True)
class GateRows:
    """The rows that gates are trained and measured on.

    Attributes:
        train: Per adapter, its train rows.
        held_out: Per adapter, its held-out rows.
        composites: Train rows that belong to several adapters.
        held_out_composites: Held-out rows that belong to several adapters.
        cut: Number of rows that were cut to the longest length.
    """

    train: list[Sequence[TrainRow]]
    held_out: list[list[TrainRow]]
    composites: list[TrainRow]
    held_out_composites: list[TrainRow]
    cut: int


def gate_rows(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], settings: GateTrainSettings, job: TrainJob) -> GateRows:
    """Read and tokenise the datasets of all adapters, and make composites of them if the settings say so. Raises DataError, UsageError."""
    parts = [encoded_rows(job, name, tokenizer, index, settings) for index, name in enumerate(names)]
    encoded, held = [each for each, _ in parts], [rows for _, rows in parts]
    composites, held_composites, cut = [], [], sum(each.cut for each in encoded)
    if settings.composite_rows:
        train_parts, held_parts = zip(*(train_rows(job, name, settings.seed) for name in names), strict=True)
        drawn = settings.max_steps * settings.accumulation * settings.batch_size * job.runtime.world
        needed = math.ceil(settings.composite_rows * drawn) + RIDGE_COMPOSITES
        make = partial(make_composites, tokenizer=tokenizer, largest=settings.composite_max, max_length=settings.max_length, seed=settings.seed)
        drawn_composites = make(train_parts, count=min(POOL, needed))
        composites, cut = list(drawn_composites.rows), cut + drawn_composites.cut
        if all(held_parts):
            held_composites = list(make(held_parts, count=HELD_OUT_COMPOSITES).rows)
    return GateRows([each.rows for each in encoded], held, composites, held_composites, cut)
