"""The datasets in a folder, and the names of their tasks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meteora_core.data.formats.files import READABLE, bare_name, has_data_name
from meteora_core.data.formats.sources import TEST, TRAIN, dataset_files, is_hub_name, is_saved
from meteora_core.errors import DataError, UsageError
from meteora_core.names import problem_of
from meteora_core.reading import check_regular, shown_path

_SPLIT = re.compile(rf"(.+?)[._-]({'|'.join((*TRAIN, *TEST))})", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A dataset that was found.

    Attributes:
        name: Name of its task.
        train: File, folder or hub name of the dataset.
        test: File of the test rows, if it is a separate one.
    """

    name: str
    train: str
    test: str | None = None


def find_datasets(source: str) -> list[Found]:
    """The datasets of a path or a hub name, sorted by name.

    A file, a saved dataset, or a folder with ``train`` files is one dataset of the same name. Any other folder contains several: each data file and each
    folder that is a dataset. ``sql_train.csv`` and ``sql_test.csv`` (also with a dot or a hyphen) are one dataset. Other files are ignored.

    Args:
        source: Path of a file or a folder, or name of a hub dataset.

    Raises:
        UsageError: The path does not exist.
        DataError: The folder contains no dataset, or two with the same name.
    """
    path = Path(source)
    if is_hub_name(source):
        return [Found(task_name(source.removeprefix("hub:").partition("@")[0].rpartition("/")[2]), source)]
    if not path.exists() and not path.is_symlink():
        name = source if not problem_of(source) else "NAME"
        raise UsageError(f"no such file or folder: {shown_path(path)}", hint=f"name a file: meteora data add {name} --train FILE")
    if not path.is_dir():
        check_regular(path)
        return [Found(task_name(bare_name(path)), source)]
    if is_saved(path) or _is_one(path):
        return [Found(task_name(path.resolve().name), source)]
    found = [*_files(path), *_folders(path)]
    if not found:
        raise DataError(f"no dataset in {shown_path(path)}", hint=f"a dataset is a file ({READABLE}), a folder with a train file, or what `datasets` saved")
    repeated = next((one.name for index, one in enumerate(found) if one.name in [other.name for other in found[:index]]), None)
    if repeated is not None:
        both = ", ".join(shown_path(each.train) for each in found if each.name == repeated)
        raise DataError(f"{shown_path(path)} has two datasets called {repeated}: {both}", hint="`meteora data add NAME --train PATH` adds one of them")
    return sorted(found, key=lambda one: one.name)


def task_name(text: str) -> str:
    """A task's name from a file's name. Characters that a name cannot contain become hyphens.

    Raises:
        UsageError: The result is not a valid name.
    """
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip(".-")
    if problem := problem_of(name):
        raise UsageError(f"{text!r} cannot name a task: {problem}", hint="choose a name: meteora data add NAME --train FILE")
    return name


def _is_one(folder: Path) -> bool:
    try:
        train, _ = dataset_files(folder)
    except DataError:
        return True  # opening the dataset reports the problem
    return train is not None and any(word == bare_name(train).lower().partition("-")[0] for word in TRAIN)


def _files(folder: Path) -> list[Found]:
    whole: dict[str, Path] = {}
    tests: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not has_data_name(path) or path.name.startswith("."):
            continue
        name, split = bare_name(path), None
        if parts := _SPLIT.fullmatch(name):
            name, split = parts[1], parts[2].lower()
        known = tests if split in TEST else whole
        if name in known:
            raise DataError(
                f"{shown_path(folder)} has two files of {name}: {known[name].name}, {path.name}", hint="`meteora data add NAME --train FILE` adds one of them"
            )
        known[name] = path
    for name in [name for name in tests if name not in whole]:
        whole[tests[name].name.partition(".")[0]] = tests.pop(name)
    return [Found(task_name(name), str(path), str(tests[name]) if name in tests else None) for name, path in whole.items()]


def _folders(folder: Path) -> list[Found]:
    return [
        Found(task_name(path.name), str(path))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".") and (is_saved(path) or _is_one(path) or _single(path))
    ]


def _single(folder: Path) -> bool:
    try:
        return dataset_files(folder)[0] is not None
    except DataError:
        return True
