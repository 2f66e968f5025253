"""The local source: a folder in BIG-bench's repository layout, in the hub's exported JSON-lines layout, or of raw or finished rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from meteora_core.data import bigbench
from meteora_core.data.extract import Extract, NotHere
from meteora_core.data.records import SOURCE_SPLIT, SPLIT_RULE, VALIDATION_SPLIT, divide, record_to_row
from meteora_core.data.rows import Row, Split
from meteora_core.data.tasks import BigBench, Records, Task
from meteora_core.errors import DataError
from meteora_core.files import sha256
from meteora_core.json_files import read_jsonl
from meteora_core.reading import check_regular, kind_of

TEST_FILES = ("test.jsonl", "validation.jsonl")


def find_folder(task: Task, raw_dir: Path) -> Path | None:
    """The folder of ``task`` below ``raw_dir``, or None.

    Args:
        task: The task.
        raw_dir: BIG-bench's repository, its folder ``benchmark_tasks``, or any folder with one folder for each task.
    """
    names = [task.name]
    if isinstance(task.source, BigBench) and task.source.folder != task.name:
        names.append(task.source.folder)
    for parent in (raw_dir, raw_dir / "bigbench" / "benchmark_tasks", raw_dir / "benchmark_tasks"):
        for name in names:
            if (parent / name).is_dir():
                return parent / name
    return None


def extract_local(task: Task, raw_dir: Path) -> Extract:
    """Read ``task`` from a folder of raw tasks.

    Args:
        task: The task.
        raw_dir: Folder of raw tasks, as in :func:`find_folder`.

    Raises:
        NotHere: There is no such folder.
        DataError: The folder's files are not of a known layout, or are broken.
    """
    if not raw_dir.is_dir():
        if raw_dir.exists():
            raise DataError(f"{raw_dir} is {kind_of(raw_dir.stat().st_mode)}, not a folder of raw tasks or an archive", hint="pass another one by --raw-dir")
        raise NotHere(f"no such folder: {raw_dir}", hint="pass the folder that contains one folder per raw task by --raw-dir")
    folder = find_folder(task, raw_dir)
    if folder is None:
        raise NotHere(f"no folder {task.name} in {raw_dir}")
    if isinstance(task.source, BigBench) and (folder / "task.json").is_file():
        return from_bigbench(task, folder, {"kind": "local", "name": "BIG-bench repository layout"})
    test = next((folder / name for name in TEST_FILES if (folder / name).is_file()), None)
    train = folder / "train.jsonl"
    if not train.is_file() and test is None:
        raise DataError(f"{folder} has neither task.json nor train.jsonl", hint="a raw task is task.json as in BIG-bench's repository, or train.jsonl")
    return from_files(task, train if train.is_file() else None, test, {"kind": "local", "name": "JSON lines"})


def from_bigbench(task: Task, folder: Path, origin: dict[str, Any]) -> Extract:
    """Read a task in BIG-bench's repository layout; the hashes of the files are added to ``origin``.

    Raises:
        DataError: A file is missing, broken, or too small to split.
    """
    files = bigbench.task_files(folder)
    counts = {"train": 0, "test": 0}
    for index in files:
        try:
            train, test = bigbench.split_order(len(index))
        except ValueError as few:
            raise DataError(f"{index.path}: {few}") from few
        counts["train"] += len(train)
        counts["test"] += len(test)
    parts = [
        {"path": index.path.relative_to(folder.parent).as_posix(), "sha256": index.sha256, "examples": index.total, "distinct": len(index)} for index in files
    ]

    def rows(split: Split) -> Iterator[Row]:
        return bigbench.iter_split(task, files, split)

    dropped = sum(index.total - len(index) for index in files)
    return Extract({**origin, "files": parts}, bigbench.SPLIT_RULE, bigbench.SEED, rows, counts=counts, duplicates_dropped=dropped)


def from_files(task: Task, train: Path | None, test: Path | None, origin: dict[str, Any]) -> Extract:
    """Read a task from JSON-lines files. Without a test file, some train rows become test rows; without a train file, there are only test rows.

    Raises:
        DataError: A file is missing or a row is broken.
    """
    train_cap, test_cap = (task.source.train_cap, task.source.test_cap) if isinstance(task.source, Records) else (None, None)
    paths = [path for path in (train, test) if path is not None]
    for path in paths:
        check_regular(path)
    origin = {**origin, "files": [{"path": path.name, "sha256": sha256(path)} for path in paths]}
    if train is None:
        assert test is not None
        only: Path = test
        return Extract(origin, "test rows only", None, lambda split: _read(task, only, test_cap), splits=("test",))
    whole: Path = train
    if test is None:
        parts = divide(list(_read(task, whole, train_cap)))
        divided = {"train": parts[0], "test": parts[1]}
        counts = {split: len(rows) for split, rows in divided.items()}
        return Extract(origin, SPLIT_RULE, bigbench.SEED, lambda split: iter(divided[split]), counts=counts)
    held_out: Path = test
    rule = SOURCE_SPLIT if test.name == "test.jsonl" else VALIDATION_SPLIT

    def rows(split: Split) -> Iterator[Row]:
        return _read(task, whole, train_cap) if split == "train" else _read(task, held_out, test_cap)

    return Extract(origin, rule, None, rows)


def _read(task: Task, path: Path, cap: int | None) -> Iterator[Row]:
    for number, record in enumerate(islice(read_jsonl(path), cap), start=1):
        try:
            yield record_to_row(task, record)
        except ValueError as broken:
            raise DataError(f"{path}: row {number}: {broken}") from broken
