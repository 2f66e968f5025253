"""Tokenised train rows on disk: written once by Hugging Face ``datasets``, then read row by row from a memory-mapped Arrow file.

An entry holds whole rows. The maximum length, the held-out split and the gate label are applied when a row is read. The prompt template is part of the
dataset's file and therefore of its hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meteora_core.data.dataset_frames import row_end
from meteora_core.data.rows import split_path, stream_rows
from meteora_core.errors import DataError, MeteoraError, StorageError
from meteora_core.files import locked, sha256, storage_errors
from meteora_core.json_files import read_json, write_json
from meteora_core.progress import SILENT, Progress
from meteora_core.training.encoding import RowsOnDemand, TrainRow, fit_row, leading_special_tokens, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of the file format of the cache."""

HASHES = "sha256.json"
"""Name of the file of an entry that holds the hashes of the others."""

CHUNK = 512
"""Number of rows that are tokenised together."""


class CachedRows(RowsOnDemand):
    """The rows that :func:`meteora_core.training.encoding.encode_rows` would give, each read from disk when it is accessed.

    Args:
        dataset: Dataset with the columns ``tokens``, ``start`` and ``length``.
        indices: Indices of the rows in the dataset, in order.
        adapter: Gate label of every token.
        head: Number of special tokens at the start of every row, which are not cut.
        max_length: Maximum row length in tokens.

    Attributes:
        lengths: Number of tokens of every row.
        cut: Number of rows that were longer than ``max_length``.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], adapter: int, head: int, max_length: int) -> None:
        self._dataset, self._indices = dataset, np.asarray(indices, dtype=np.int64)
        self._adapter, self._head, self._max_length = adapter, head, max_length
        whole = np.asarray(dataset.with_format("numpy")["length"][:])[self._indices]
        self.lengths: list[int] = np.minimum(whole, max_length).tolist()
        self.cut = int((whole > max_length).sum())

    def row(self, index: int) -> TrainRow:
        row = self._dataset[int(self._indices[index])]
        return fit_row(row["tokens"], [self._adapter] * len(row["tokens"]), row["start"], self._head, self._max_length)[0]


def cached_rows(data_dir: Path, task: str, tokenizer: PreTrainedTokenizerBase, root: Path, *, max_rows: int | None = None, progress: Progress = SILENT) -> Any:
    """The tokenised train rows of a task, as a memory-mapped ``datasets.Dataset`` with ``tokens``, ``start`` (of the response) and ``length``.

    The rows are tokenised if the cache has no entry for the same file, tokenizer and number of rows. Several processes may call this at the same time. A
    broken entry is replaced.

    Args:
        data_dir, task: Folder of all datasets, and the name of a built dataset.
        tokenizer: The base model's tokenizer.
        root: Folder of the cache, with one folder per entry.
        max_rows: Number of rows to use, from the first on; None uses all.
        progress: Object that progress is reported to.

    Raises:
        DataError: The dataset is missing, broken or empty.
        StorageError: The cache cannot be written.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    datasets.disable_progress_bars()
    path = split_path(data_dir, task, "train")
    next(stream_rows(data_dir, task, "train", 1))
    end = row_end(data_dir, task, tokenizer)
    named = {"format": FORMAT, "file": sha256(path), "tokenizer": tokenizer_fingerprint(tokenizer), "rows": max_rows}
    named |= {} if end is None else {"end": end}
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{task}-{key}"
    tokens = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"tokens": tokens, "start": datasets.Value("int32"), "length": datasets.Value("int32")})

    def generate() -> Iterator[dict[str, Any]]:
        yield from _generate(stream_rows(data_dir, task, "train", max_rows), tokenizer, end, f"tokenising {task}", progress)

    for last in (False, True):
        try:
            with storage_errors(folder), locked(folder, wait=True):
                dataset = datasets.Dataset.from_generator(generate, features=features, cache_dir=str(folder), fingerprint=key)
                _check_hashes(folder, [Path(file["filename"]) for file in dataset.cache_files])
                return dataset
        except DatasetGenerationError as failed:
            with storage_errors(folder):
                raise (failed.__cause__ if isinstance(failed.__cause__, MeteoraError | OSError) else failed) from failed
        except (ArrowInvalid, ValueError, TypeError, KeyError, AttributeError) as broken:  # raised by `datasets` for a truncated or changed entry
            if last:
                raise StorageError(f"the cache of tokens at {folder} cannot be used: {broken}", hint="remove that folder, or set METEORA_CACHE") from broken
            shutil.rmtree(folder, ignore_errors=True)
        except StorageError as failed:  # for example, a file of the entry is missing
            if last or not isinstance(failed.__cause__, FileNotFoundError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("unreachable")


def _check_hashes(folder: Path, files: Sequence[Path]) -> None:
    """Record the hashes of the files of a new entry, or raise ValueError if the files of an entry are not those that were recorded."""
    record, hashes = folder / HASHES, {file.name: sha256(file) for file in files}
    if not record.is_file():
        write_json(record, hashes)
        return
    try:
        recorded = read_json(record)
    except DataError as broken:
        raise ValueError(str(broken)) from broken
    if recorded != hashes:
        raise ValueError("its files are not those that were written")


def _generate(rows: Iterator[Any], tokenizer: PreTrainedTokenizerBase, end: int | None, title: str, progress: Progress) -> Iterator[dict[str, Any]]:
    with progress.task(title, unit="rows") as bar:
        while chunk := list(islice(rows, CHUNK)):
            for _, start, ids, _ in tokenised([(row.prompt, row.response) for row in chunk], tokenizer, end):
                yield {"tokens": ids, "start": start, "length": len(ids)}
            bar.update(len(chunk))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that determines a tokenizer's output: its rules, its vocabulary and its end-of-sequence token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):
        rules.pop(state, None)
    named = {"rules": rules, "class": type(tokenizer).__name__, "name": None if rules else tokenizer.name_or_path, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def open_rows(dataset: Any, places: Sequence[int], tokenizer: PreTrainedTokenizerBase, adapter: int, max_length: int) -> CachedRows:
    """The rows with the indices ``places`` of :func:`cached_rows`, cut to ``max_length`` tokens and labelled with ``adapter``."""
    return CachedRows(dataset, places, adapter, leading_special_tokens(tokenizer), max_length)
