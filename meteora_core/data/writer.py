"""Writing of datasets: rows to files with hashes, completely or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from meteora_core.data.manifest import NAME, FileEntry, read_manifest
from meteora_core.data.rows import SPLITS, Row
from meteora_core.errors import DataError
from meteora_core.files import atomic_folder, other_entries, storage_errors
from meteora_core.progress import ProgressBar
from meteora_core.text import listed

_BATCH = 512


def row_line(row: Row) -> bytes:
    """A row as one line in UTF-8. Half of a surrogate pair, which UTF-8 cannot encode, is written as an escape."""
    value = {"prompt": row.prompt, "response": row.response}
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value) + "\n").encode()


def prompt_key(row: Row) -> bytes:
    """A key of 16 bytes that identifies a row's prompt."""
    return hashlib.blake2b(row.prompt.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def write_rows(path: Path, rows: Iterable[Row], task: ProgressBar) -> FileEntry:
    """Write rows to a new file in an unfinished dataset folder.

    Raises:
        StorageError: The disk is full.
    """
    digest = hashlib.sha256()
    count = size = pending = 0
    with storage_errors(path), open(path, "wb") as handle:
        for row in rows:
            line = row_line(row)
            handle.write(line)
            digest.update(line)
            size += len(line)
            count += 1
            pending += 1
            if pending == _BATCH:
                task.update(pending)
                pending = 0
    task.update(pending)
    return FileEntry(count, size, digest.hexdigest())


@contextmanager
def dataset_folder(folder: Path, task: str, *, composite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder`` if the block ends without an error.

    Raises:
        DataError: ``folder`` exists and is not an earlier build of ``task``; see :func:`check_target`.
        StorageError: The folder cannot be written.
    """
    check_target(folder, task, composite=composite)
    with atomic_folder(folder) as work:
        yield work


def check_target(folder: Path, task: str, *, composite: bool = False) -> None:
    """Check that ``folder`` is free or holds an earlier build of the same task.

    Args:
        folder: Folder of the dataset.
        task: Name of the task.
        composite: Whether the task is a composite. A composite replaces only composites, and only a composite replaces one.

    Raises:
        DataError: The folder holds another dataset, or files without a manifest.
    """
    if not folder.exists():
        return
    hint = "choose another folder with --out, or move this one away"
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, not a folder", hint=hint)
    if not any(folder.iterdir()):
        return
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} holds files that were not built here (it has no {NAME})", hint=hint)
    if manifest.task != task:
        raise DataError(f"{folder} holds the dataset of {manifest.task}, not of {task}", hint=hint)
    if composite and manifest.metric != "composite":
        raise DataError(f"{folder} holds a dataset that is not a composite", hint="choose another --name, or move this one away")
    if manifest.metric == "composite" and not composite:
        raise DataError(f"{folder} holds a composite", hint="choose another name, or move this one away")
    if others := other_entries(folder, (NAME, *(f"{split}.jsonl" for split in SPLITS))):
        raise DataError(f"{folder} contains files that do not belong to the dataset and would be lost: {listed(others)}", hint=hint)
