"""Reading of built datasets: ``DIR/<task>/{train,test}.jsonl`` with one ``{"prompt", "response"}`` object per line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meteora_core.data.tasks import RESERVED, TASK_ORDER, TASKS, Files
from meteora_core.errors import DataError
from meteora_core.json_files import has_surrogate, read_jsonl
from meteora_core.reading import present

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class Row:
    """A prompt that the model reads, and the response that it should give."""

    prompt: str
    response: str


def build_command(task: str, data_dir: Path | str = "datasets") -> str:
    """The command that builds the dataset of ``task``. For a user's task, ``FILE`` stands for the user's file.

    Args:
        task: Name of the task.
        data_dir: Folder of all datasets.
    """
    return build_commands([task], data_dir)[0]


def build_commands(tasks: Sequence[str], data_dir: Path | str = "datasets") -> list[str]:
    """The commands that build the datasets of ``tasks``: first built-in and declared tasks, then the user's tasks, then composites."""
    to = "" if str(data_dir) == "datasets" else f" --out {shlex.quote(str(data_dir))}"
    built = [name for name in dict.fromkeys(tasks) if _can_be_built(name, data_dir)]
    numbered = [name for name in dict.fromkeys(tasks) if _composite_size(name)]
    own = [name for name in dict.fromkeys(tasks) if name not in built and name not in numbered]
    commands = [f"meteora data build --task {','.join(built)}{to}"] if built else []
    commands += [f"meteora data add {shlex.quote(name)} --train FILE{to}" for name in own]
    return [*commands, *(f"meteora data composite --n {_composite_size(name)}{to}" for name in numbered)]


def _can_be_built(name: str, data_dir: Path | str) -> bool:
    """Whether `data build` knows the source of a task: a task of the table, or one that the settings declare."""
    if name in RESERVED:
        return True
    task = TASKS.get(name)
    return task is not None and isinstance(task.source, Files) and Path(task.source.train) != split_path(data_dir, name, "train")


def _composite_size(name: str) -> int | None:
    found = re.fullmatch(r"composite_([0-9]{1,2})", name)
    size = int(found.group(1)) if found else 0
    return size if 2 <= size <= len(TASK_ORDER) else None


def split_path(data_dir: Path | str, task: str, split: str) -> Path:
    """The path of the rows of a task's split."""
    return Path(data_dir) / task / f"{split}.jsonl"


def iter_rows(path: Path, *, hint: str | None = None) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        DataError: The file is missing or a line is broken; the message names file, line and column.
    """
    for number, row in enumerate(read_jsonl(path, required=("prompt", "response"), hint=hint), start=1):
        for key in ("prompt", "response"):
            if not isinstance(row[key], str):
                raise DataError(f"{path}: row {number}: {key!r} is not a text", hint=hint)
        yield Row(row["prompt"], row["response"])


def stream_rows(data_dir: Path | str, task: str, split: str, limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a task.

    Args:
        data_dir: Folder of all datasets.
        task: Name of the task.
        split: Name of the split, ``"train"`` or ``"test"``.
        limit: Largest number of rows, counted from the start of the file; None for all.

    Raises:
        DataError: The dataset is not built (the hint is the command that builds it), a line is broken, or there is no row.
    """
    path = split_path(data_dir, task, split)
    if not present(path):
        raise DataError(f"no {split} rows of {task} in {data_dir}", hint=f"run `{build_command(task, data_dir)}`")
    count = 0
    if limit is None or limit > 0:
        for row in iter_rows(path, hint=f"run `{build_command(task, data_dir)}` to build it again"):
            yield row
            count += 1
            if limit is not None and count >= limit:
                return
        if not count:
            raise DataError(f"{path} has no rows", hint=f"run `{build_command(task, data_dir)}` to build it again")


def read_rows(data_dir: Path | str, task: str, split: str, limit: int | None = None) -> list[Row]:
    """The rows of a task as a list; the arguments and errors are those of :func:`stream_rows`."""
    return list(stream_rows(data_dir, task, split, limit))


def check_rows(data_dir: Path | str, task: str, split: str, limit: int | None = None) -> int:
    """Read the rows of a task and return their number; the arguments and errors are those of :func:`stream_rows`."""
    return sum(1 for _ in stream_rows(data_dir, task, split, limit))


def available_tasks(data_dir: Path | str) -> list[str]:
    """The names of the datasets in ``data_dir``, which are the folders with a train or a test file, sorted."""
    root = Path(data_dir)
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".") and any((entry / f"{split}.jsonl").is_file() for split in SPLITS))


def check_texts(texts: Sequence[str]) -> None:
    """Raise DataError for a text with half of a surrogate pair, which JSON can contain but UTF-8 and tokenizers cannot."""
    broken = next((text for text in texts if has_surrogate(text)), None)
    if broken is not None:
        raise DataError(f"a row holds half of a character (a lone surrogate), which no tokenizer takes: {broken[:60]!a}", hint="remove it from the dataset")
