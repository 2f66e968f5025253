"""The rows of one task: which are trained on and which are held out, tokenised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.data.rows import Row, read_rows
from meteora_core.progress import SILENT, Progress
from meteora_core.training.encoding import Encoded, TrainRow, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HELD_OUT = 64
"""At most so many train rows of a task are kept out of training, to watch it by; test rows are never looked at."""


def split_places(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` rows are trained on, and which are held out: a tenth of the rows, at most 64, drawn by seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    held = order[: min(HELD_OUT, count // 10)]
    return sorted(set(order) - set(held)), held


def split_held_out(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Train rows and held-out rows; see :func:`split_places`."""
    train, held = split_places(len(rows), seed)
    return [rows[place] for place in train], [rows[place] for place in held]


def train_rows(data_dir: Path, task: str, seed: int, max_rows: int | None = None) -> tuple[list[Row], list[Row]]:
    """The train and held-out rows of a built dataset. Raises DataError when it is missing or broken."""
    return split_held_out(read_rows(data_dir, task, "train", max_rows), seed)


def encoded_rows(
    data_dir: Path,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    adapter: int,
    *,
    max_length: int,
    seed: int,
    max_rows: int | None = None,
    token_cache: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[Encoded, list[TrainRow]]:
    """The tokenised train and held-out rows of a built dataset.

    Args:
        data_dir, task: The dataset.
        tokenizer: The base model's.
        adapter: Gate label of every token.
        max_length: Longest row, in tokens.
        seed: Chooses the held-out rows.
        max_rows: Use only the first so many rows.
        token_cache: Where tokenised rows are kept (:mod:`meteora_core.training.token_cache`), train rows are read from there as they are
            needed; None tokenises them now, and holds them in memory. The rows are the same.
        progress: Where to report.

    Raises:
        DataError: The dataset is missing or broken.
    """
    if token_cache is None:
        train, held = train_rows(data_dir, task, seed, max_rows)
        return encode_rows(train, tokenizer, adapter, max_length), list(encode_rows(held, tokenizer, adapter, max_length).rows) if held else []
    from meteora_core.training.token_cache import cached_rows, open_rows

    dataset = cached_rows(data_dir, task, tokenizer, token_cache, max_rows=max_rows, progress=progress)
    places, held_places = split_places(len(dataset), seed)
    rows = open_rows(dataset, places, tokenizer, adapter, max_length)
    return Encoded(rows, rows.cut), open_rows(dataset, held_places, tokenizer, adapter, max_length)[:]
