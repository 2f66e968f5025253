"""The sources of users' datasets: files, folders, saved ``datasets`` folders and datasets on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_core.data.formats.files import KINDS, bare_name, has_data_name
from meteora_core.data.formats.tables import Table, file_table, library_errors, split_table
from meteora_core.errors import DataError
from meteora_core.files import sha256
from meteora_core.reading import kind_of, shown_path
from meteora_core.text import listed

SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Names of files in a folder that ``datasets`` saved."""

TRAIN = ("train", "training")
TEST = ("test", "testing", "eval", "validation", "valid", "val", "dev")
"""Names of splits and of their files, in the order of preference."""

_HUB = re.compile(r"(?:hub:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?")


@dataclass(frozen=True)
class Opened:
    """An open dataset of the user.

    Attributes:
        train: Table of the train rows.
        test: Table of the test rows; None if some train rows have to become test rows.
        origin: Origin of the rows, for the manifest.
        validation: Whether the test rows are the source's validation split.
    """

    train: Table
    test: Table | None
    origin: dict[str, Any]
    validation: bool = False


def is_hub_name(source: str) -> bool:
    """Whether a text names a dataset on the hub (``user/name``, ``user/name@revision`` or ``hub:user/name``) rather than a path."""
    return bool(_HUB.fullmatch(source)) and (source.startswith("hub:") or not Path(source).exists())


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved this folder by ``save_to_disk``."""
    return (folder / SAVED[0]).is_file() or all((folder / name).is_file() for name in SAVED[1:])


def open_source(train: Path | str, test: Path | str | None = None, subset: str | None = None) -> Opened:
    """Open a user's dataset.

    Args:
        train: Data file, folder of one dataset, saved ``datasets`` folder, or name of a hub dataset.
        test: The same for the test rows; None for those of ``train``, if it has any.
        subset: Configuration of a hub dataset.

    Raises:
        DataError: The dataset is missing or broken, or has no train rows.
        DownloadError: The hub cannot be reached.
    """
    opened = _open(train, subset)
    if test is None:
        return opened
    other = _open(test, subset)
    origin = {**opened.origin, "test": other.origin} if "files" not in opened.origin or "files" not in other.origin else _joined(opened.origin, other.origin)
    return Opened(opened.train, other.test or other.train, origin)


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {**one, "files": [*one["files"], *other["files"]]}


def _open(source: Path | str, subset: str | None) -> Opened:
    if is_hub_name(str(source)):
        return _open_hub(str(source).removeprefix("hub:"), subset)
    path = Path(source)
    if not path.is_dir():
        return Opened(file_table(path), None, _origin([path]))
    if is_saved(path):
        return _open_saved(path)
    train, test = dataset_files(path)
    if train is None:
        raise DataError(f"{shown_path(path)} has no train rows", hint=f"name a file, or a folder with train.jsonl (also {', '.join(list(KINDS)[1:])})")
    if test is None:
        return Opened(file_table(train), None, _origin([train]))
    return Opened(file_table(train), file_table(test), _origin([train, test]), validation=_bare(test) not in TEST[:2])


def dataset_files(folder: Path) -> tuple[Path | None, Path | None]:
    """The train file and the test file of a folder with one dataset: the files that are named after splits, or its only data file.

    Raises:
        DataError: There are two files for one split.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and has_data_name(path)]
    found: list[Path | None] = []
    for names in (TRAIN, TEST):
        name = next((name for name in names if any(_bare(path) == name for path in files)), None)
        fitting = [path for path in files if _bare(path) == name]
        if len(fitting) > 1:
            raise DataError(f"{shown_path(folder)} has two files of one split: {listed(path.name for path in fitting)}", hint="name one of them")
        found.append(fitting[0] if fitting else None)
    if found[0] is None and len(files) == 1 and found[1] is None:
        return files[0], None
    return found[0], found[1]


def _bare(path: Path) -> str:
    """The name of a file's split: ``"train"`` for ``train.jsonl`` and for the hub's ``train-00000-of-00001.parquet``."""
    return re.sub(r"-0{5}-of-0{4}1$", "", bare_name(path).lower())


def _origin(paths: list[Path]) -> dict[str, Any]:
    return {"kind": "local", "name": "own files", "files": [{"path": path.name, "sha256": sha256(path)} for path in paths]}


def _open_saved(folder: Path) -> Opened:
    import datasets

    name = shown_path(folder)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() and not path.is_dir():
            raise DataError(f"{shown_path(path)} is {kind_of(path.stat().st_mode)}, not a file")
    with library_errors(name):
        loaded = datasets.load_from_disk(str(folder))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix == ".arrow"]
    origin = {"kind": "local", "name": "saved dataset", "files": [{"path": path.relative_to(folder).as_posix(), "sha256": sha256(path)} for path in files]}
    if not isinstance(loaded, dict):
        return Opened(split_table(name, loaded), None, origin)
    return _of_splits(name, loaded, origin)


def _open_hub(source: str, subset: str | None) -> Opened:
    from meteora_core.data import hub_source

    repository, _, revision = source.partition("@")
    loaded = hub_source.load_splits(repository, subset, revision=revision or None)
    used = {name: hub_source.fingerprint(split) for name, split in loaded.items() if name in (*TRAIN, *TEST)}
    origin = {"kind": "hub", "name": repository, "config": subset, "revision": revision or None, "fingerprints": used}
    return _of_splits(source, loaded, origin)


def _of_splits(name: str, splits: Mapping[str, Any], origin: dict[str, Any]) -> Opened:
    train = next((splits[each] for each in TRAIN if each in splits), next(iter(splits.values())) if len(splits) == 1 else None)
    if train is None:
        raise DataError(
            f"{name} has no split 'train'; there are: {listed(splits)}", hint="save one of them as a file, and add it with `meteora data add NAME --train FILE`"
        )
    tested = next((each for each in TEST if each in splits and splits[each] is not train), None)
    test = None if tested is None else split_table(f"{name} ({tested})", splits[tested])
    return Opened(split_table(name, train), test, origin, tested is not None and tested not in TEST[:2])
