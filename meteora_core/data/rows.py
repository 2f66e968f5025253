"""Reading built datasets: ``DIR/<task>/{train,test}.jsonl``, one ``{"prompt", "response"}`` object a line."""

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
    """One example: what the model reads and what it should answer."""

    prompt: str
    response: str


def build_command(task: str, data_dir: Path | str = "datasets") -> str:
    """The command that makes the dataset of ``task``; one that works when it is typed, but for the name of a file of the user's own.

    Args:
        task: The task's name.
        data_dir: The folder of all datasets.
    """
    return build_commands([task], data_dir)[0]


def build_commands(tasks: Sequence[str], data_dir: Path | str = "datasets") -> list[str]:
    """The commands that make the datasets of ``tasks``: built-in and declared tasks are built, the user's own are added, composites come last."""
    to = "" if str(data_dir) == "datasets" else f" --out {shlex.quote(str(data_dir))}"
    built = [name for name in dict.fromkeys(tasks) if _can_be_built(name, data_dir)]
    numbered = [name for name in dict.fromkeys(tasks) if _composite_size(name)]
    own = [name for name in dict.fromkeys(tasks) if name not in built and name not in numbered]
    commands = [f"meteora data build --task {','.join(built)}{to}"] if built else []
    commands += [f"meteora data add {shlex.quote(name)} --train FILE{to}" for name in own]
    return [*commands, *(f"meteora data composite --n {_composite_size(name)}{to}" for name in numbered)]


def _can_be_built(name: str, data_dir: Path | str) -> bool:
    """Whether `data build` knows where the rows of a task come from: a task of the table, or one that the settings declare."""
    if name in RESERVED:
        return True
    task = TASKS.get(name)
    return task is not None and isinstance(task.source, Files) and Path(task.source.train) != split_path(data_dir, name, "train")


def _composite_size(name: str) -> int | None:
    found = re.fullmatch(r"composite_([0-9]{1,2})", name)
    size = int(found.group(1)) if found else 0
    return size if 2 <= size <= len(TASK_ORDER) else None


def split_path(data_dir: Path | str, task: str, split: str) -> Path:
    """Where the rows of a task's split are kept."""
    return Path(data_dir) / task / f"{split}.jsonl"


def iter_rows(path: Path, *, hint: str | None = None) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        DataError: The file is missing or a line is broken; file, line and column are named.
    """
    for number, row in enumerate(read_jsonl(path, required=("prompt", "response"), hint=hint), start=1):
        for key in ("prompt", "response"):
            if not isinstance(row[key], str):
                raise DataError(f"{path}: row {number}: {key!r} is not a text", hint=hint)
        yield Row(row["prompt"], row["response"])


def stream_rows(data_dir: Path | str, task: str, split: str, limit: int | None = None) -> Iterator[Row]:
    """Yield a task's rows, one after another.

    Args:
        data_dir: The folder of all datasets.
        task: The task's name.
        split: ``"train"`` or ``"test"``.
        limit: At most so many rows, the first ones.

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
    """A task's rows as a list; arguments and errors are those of :func:`stream_rows`."""
    return list(stream_rows(data_dir, task, split, limit))


def check_rows(data_dir: Path | str, task: str, split: str, limit: int | None = None) -> int:
    """Read a task's rows without keeping them, and return how many there are; arguments and errors are those of :func:`stream_rows`."""
    return sum(1 for _ in stream_rows(data_dir, task, split, limit))


def available_tasks(data_dir: Path | str) -> list[str]:
    """The names of the datasets that lie in ``data_dir`` (those with a test file or a train file), sorted."""
    root = Path(data_dir)
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".") and any((entry / f"{split}.jsonl").is_file() for split in SPLITS))


def check_texts(texts: Sequence[str]) -> None:
    """Raise DataError for a text that no tokenizer takes: one with half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    broken = next((text for text in texts if has_surrogate(text)), None)
    if broken is not None:
        raise DataError(
            f"a row holds half of a character (a lone surrogate), which no tokenizer takes: {broken[:60]!a}", hint="take it out of the dataset's rows"
        )
