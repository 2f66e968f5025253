"""The train rows and held-out rows of one task, as text and as tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora_core.data.dataset_frames import row_end
from meteora_core.data.rows import Row, read_rows
from meteora_core.settings import OptimSettings
from meteora_core.training.composites import ListRows, with_lists
from meteora_core.training.encoding import Encoded, TrainRow, encode_rows
from meteora_core.training.job import TrainJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 64
"""Maximum number of train rows of a task that are held out to measure the training; test rows are never used."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that were kept out of training, and parameters of the measurement on them.

    Attributes:
        rows: Per task, its rows.
        names: Names of the tasks, in the order of ``rows``.
        pad_token: Token id of the padding.
        batch_size: Number of rows in one forward pass.
        composites: Rows that belong to several tasks; they are reported separately.
        response_only: Whether the language-model loss leaves out the prompts.
    """

    rows: Sequence[Sequence[TrainRow]]
    names: Sequence[str]
    pad_token: int
    batch_size: int
    composites: Sequence[TrainRow] = ()
    response_only: bool = False


def split_places(count: int, seed: int) -> tuple[list[int], list[int]]:
    """The indices of the train rows and of the held-out rows; a tenth of ``count`` rows is held out, at most 64, drawn by ``seed``."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    held = order[: min(HELD_OUT, count // 10)]
    return sorted(set(order) - set(held)), held


def split_held_out(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Train rows and held-out rows; see :func:`split_places`."""
    train, held = split_places(len(rows), seed)
    return [rows[index] for index in train], [rows[index] for index in held]


def train_rows(job: TrainJob, task: str, seed: int) -> tuple[list[Row], list[Row]]:
    """The train and held-out rows of a built dataset. Raises DataError if the dataset is missing or broken."""
    return split_held_out(read_rows(job.data_dir, task, "train", job.max_rows), seed)


def encoded_rows(job: TrainJob, task: str, tokenizer: PreTrainedTokenizerBase, adapter: int, settings: OptimSettings) -> tuple[Encoded, list[TrainRow]]:
    """The tokenised train and held-out rows of a built dataset; with ``settings.list_rows``, lists of the train rows' questions follow the train rows.

    With ``job.token_cache``, train rows are read from the cache (:mod:`meteora_core.training.token_cache`) when they are needed; otherwise they are
    tokenised by this call and kept in memory. The rows are the same. Lists are always kept in memory.

    Args:
        job: Datasets, number of rows, cache.
        task: Name of the dataset.
        tokenizer: The base model's tokenizer.
        adapter: Gate label of every token.
        settings: Settings with the maximum row length (``max_length``), the ``seed`` that selects the held-out rows, and the share and size of lists.

    Raises:
        DataError: The dataset is missing or broken.
        UsageError: The task has fewer than two train rows, and ``settings.list_rows`` asks for lists.
    """
    encoded, watched = _single_rows(job, task, tokenizer, adapter, settings)
    if settings.list_rows:
        lists = ListRows(settings.list_rows, settings.list_max, settings.max_length, settings.seed)
        train, _ = train_rows(job, task, settings.seed)
        encoded = with_lists(encoded, train, tokenizer, adapter, lists, row_end(job.data_dir, task, tokenizer))
    return encoded, watched


def _single_rows(job: TrainJob, task: str, tokenizer: PreTrainedTokenizerBase, adapter: int, settings: OptimSettings) -> tuple[Encoded, list[TrainRow]]:
    if job.token_cache is None:
        train, held = train_rows(job, task, settings.seed)
        end = row_end(job.data_dir, task, tokenizer)
        watched = encode_rows(held, tokenizer, adapter, settings.max_length, end).rows if held else ()
        return encode_rows(train, tokenizer, adapter, settings.max_length, end), list(watched)
    from meteora_core.training.token_cache import cached_rows, open_rows

    dataset = cached_rows(job.data_dir, task, tokenizer, job.token_cache, max_rows=job.max_rows, progress=job.progress)
    train_indices, held_indices = split_places(len(dataset), settings.seed)
    rows = open_rows(dataset, train_indices, tokenizer, adapter, settings.max_length)
    return Encoded(rows, rows.cut), open_rows(dataset, held_indices, tokenizer, adapter, settings.max_length)[:]
