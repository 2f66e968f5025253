"""The rows that gates are trained and measured on: each adapter's own task, and rows of several tasks (composites and joined rows)."""

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
from meteora_core.training.joined_rows import make_joined
from meteora_core.training.task_rows import encoded_rows, train_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RIDGE_COMPOSITES = 32
"""Number of composites, and of joined rows, in addition to those of the training steps, for the ridge start."""

HELD_OUT_COMPOSITES = 24


@dataclass(frozen=True)
class GateRows:
    """The rows that gates are trained and measured on.

    Attributes:
        train: Per adapter, its train rows.
        held_out: Per adapter, its held-out rows.
        mixed: Train rows that belong to several adapters: composites and joined rows, in proportion to their shares.
        held_out_composites: Held-out composites.
        cut: Number of rows that were cut to the longest length.
    """

    train: list[Sequence[TrainRow]]
    held_out: list[list[TrainRow]]
    mixed: list[TrainRow]
    held_out_composites: list[TrainRow]
    cut: int


def gate_rows(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], settings: GateTrainSettings, job: TrainJob) -> GateRows:
    """Read and tokenise the datasets of all adapters, and make composites and joined rows if the settings say so. Raises DataError, UsageError."""
    parts = [encoded_rows(job, name, tokenizer, index, settings) for index, name in enumerate(names)]
    encoded, held = [each for each, _ in parts], [rows for _, rows in parts]
    mixed: list[TrainRow] = []
    held_composites, cut = [], sum(each.cut for each in encoded)
    drawn = settings.max_steps * settings.accumulation * settings.batch_size * job.runtime.world
    composites, joined = counts_of_mixed(settings, drawn)
    if composites:
        train_parts, held_parts = zip(*(train_rows(job, name, settings.seed) for name in names), strict=True)
        make = partial(make_composites, tokenizer=tokenizer, largest=settings.composite_max, max_length=settings.max_length, seed=settings.seed)
        made = make(train_parts, count=composites)
        mixed, cut = list(made.rows), cut + made.cut
        if all(held_parts):
            held_composites = list(make(held_parts, count=HELD_OUT_COMPOSITES).rows)
    if joined:
        mixed += make_joined([each.rows for each in encoded], count=joined, largest=settings.joined_max, max_length=settings.max_length, seed=settings.seed)
    return GateRows([each.rows for each in encoded], held, mixed, held_composites, cut)


def name_of_mixed(settings: GateTrainSettings) -> str:
    """What rows that belong to several adapters are called in the record of a training: composites, joined rows, or both."""
    names = [name for name, share in (("composites", settings.composite_rows), ("joined rows", settings.joined_rows)) if share]
    return " and ".join(names) or "composites"


def counts_of_mixed(settings: GateTrainSettings, drawn: int) -> tuple[int, int]:
    """The numbers of composites and of joined rows to make. If both are used, the numbers are in proportion to their shares.

    Args:
        settings: The shares.
        drawn: Number of rows that the training steps draw.
    """
    shares = (settings.composite_rows, settings.joined_rows)
    if not sum(shares):
        return 0, 0
    needed = sum(math.ceil(share * drawn) + RIDGE_COMPOSITES for share in shares if share)
    made = min(POOL, needed)
    return tuple(math.ceil(made * share / sum(shares)) for share in shares)  # type: ignore[return-value]
