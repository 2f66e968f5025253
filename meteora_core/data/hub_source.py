"""The hub source: Hugging Face datasets, and the authors' ready-made rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from meteora_core.data.bigbench import SEED
from meteora_core.data.extract import Extract, NotHere
from meteora_core.data.local_source import from_files
from meteora_core.data.records import SOURCE_SPLIT, SPLIT_RULE, VALIDATION_SPLIT, divide, record_to_row
from meteora_core.data.rows import Row, Split
from meteora_core.data.tasks import BigBench, Records, Task
from meteora_core.errors import DataError, DownloadError
from meteora_core.fetch.http import check_hub_environment

BIGBENCH = "tasksource/bigbench"
AUTHORS = "NJUDeepEngine/meteora_dataset"
PARQUET = "refs/convert/parquet"
"""The branch on which the hub keeps a converted copy of a dataset that consists of a script."""

NETWORK_HINT = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what its cache holds"
SOURCE_HINT = f"{NETWORK_HINT}; or use --source local --raw-dir DIR"

Locate = Callable[[str], str]
"""A function from a dataset's name to the argument for ``datasets.load_dataset``: the name itself, or a folder that replaces it."""


def itself(repository: str) -> str:
    """The name of the dataset on the hub, unchanged."""
    return repository


def extract_hub(task: Task, locate: Locate = itself) -> Extract:
    """Read a task from its dataset on the hub.

    Args:
        task: The task.
        locate: Function that maps the name of a dataset to its location.

    Raises:
        NotHere: The task is not on the hub.
        DownloadError: The hub cannot be reached, or the dataset is missing or gated.
        DataError: A record lacks a field.
        UsageError: The ``datasets`` library is not installed.
    """
    if isinstance(task.source, BigBench):
        repository, config, wanted = BIGBENCH, task.source.folder, {"train": "train", "test": "validation"}
        train_cap = test_cap = None
        rule = VALIDATION_SPLIT
    elif isinstance(task.source, Records):
        repository, config = task.source.repository, task.source.config
        wanted = {"train": "train", "test": "test"} if "test" in task.source.splits else {"train": "train"}
        train_cap, test_cap = task.source.train_cap, task.source.test_cap
        rule = SOURCE_SPLIT
    else:
        raise NotHere(f"{task.name} is not on the hub")
    loaded = load_splits(locate(repository), config, hint=SOURCE_HINT)
    for name in wanted.values():
        if name not in loaded:
            raise DataError(f"{repository} ({config}) has no split {name!r}; there are: {', '.join(loaded)}")
    caps = {"train": train_cap, "test": test_cap}
    origin = {"kind": "hub", "name": repository, "config": config, "fingerprints": {name: fingerprint(loaded[name]) for name in wanted.values()}}

    def rows(split: Split) -> Iterator[Row]:
        name = wanted[split]
        for number, record in enumerate(islice(loaded[name], caps[split]), start=1):
            try:
                yield record_to_row(task, record)
            except ValueError as broken:
                raise DataError(f"{repository} ({config}), split {name}, row {number}: {broken}") from broken

    if "test" in wanted:
        counts = {split: min(len(loaded[name]), caps[split] or len(loaded[name])) for split, name in wanted.items()}
        return Extract(origin, rule, None, rows, counts=counts)
    parts = divide(list(rows("train")))
    divided = {"train": parts[0], "test": parts[1]}
    return Extract(origin, SPLIT_RULE, SEED, lambda split: iter(divided[split]), counts={name: len(part) for name, part in divided.items()})


def extract_authors(task: Task, repository: str = AUTHORS) -> Extract:
    """Read a task's finished rows from the authors' dataset, ``<task>/{train,test}.jsonl``; composites have only test rows.

    Raises:
        DownloadError: The hub cannot be reached, or does not have the files.
        DataError: A row is broken.
    """
    paths: dict[str, Path | None] = {"train": None, "test": None}
    revision = None
    for split in ("test",) if task.is_composite else ("train", "test"):
        path = _authors_file(repository, f"{task.name}/{split}.jsonl")
        revision = path.parent.parent.name
        paths[split] = path
    return from_files(task, paths["train"], paths["test"], {"kind": "authors", "name": repository, "revision": revision})


def _authors_file(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    _check_reachable(repository, SOURCE_HINT)
    with _hub_errors(repository, SOURCE_HINT):
        return Path(hf_hub_download(repository, name, repo_type="dataset"))


def load_splits(repository: str, config: str | None = None, *, revision: str | None = None, hint: str = NETWORK_HINT) -> dict[str, Any]:
    """Every split of a dataset on the hub, by name.

    Args:
        repository: Name of the dataset, or a folder with its layout.
        config: Configuration, if the dataset has several.
        revision: Branch, tag or commit.
        hint: Hint of the error if the hub cannot be reached.

    Raises:
        DownloadError: The hub cannot be reached, or the dataset is missing or gated.
        DataError: The dataset is broken, or has several configurations and none is named.
    """
    import datasets

    datasets.disable_progress_bars()
    if not Path(repository).is_dir():
        _check_reachable(repository, hint)
    with _hub_errors(repository, hint):
        try:
            return dict(datasets.load_dataset(repository, config, revision=revision))
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            return dict(datasets.load_dataset(repository, config, revision=PARQUET))


def fingerprint(split: Any) -> dict[str, Any]:
    """The number of rows of a split and the checksums of its files, which identify its content."""
    checksums = getattr(split.info, "download_checksums", None) or {}
    return {"rows": len(split), "files": sorted(url.split("://", 1)[-1].rpartition("@")[2] for url in checksums if "://" in url)}


def _check_reachable(repository: str, hint: str) -> None:
    """Contact the hub once, without the client libraries' long retries. Raises DownloadError if it does not answer."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        check_hub_environment(constants.ENDPOINT)
    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        raise DownloadError(f"the hub cannot be reached for {repository}", hint=hint)


@lru_cache(maxsize=4)
def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    session = get_session()
    lost: tuple[type[Exception], ...] = (OSError, *_transport_errors())
    try:
        session.head(endpoint, timeout=15.0)
    except lost:
        return False
    return True


def _transport_errors() -> tuple[type[Exception], ...]:
    """The errors that the hub's client raises without a connection; depending on its version, it uses httpx or httpx2."""
    found: list[type[Exception]] = [ConnectionError]
    for name in ("httpx", "httpx2"):
        library = sys.modules.get(name)
        if library is not None:
            found.append(library.TransportError)
    return tuple(found)


@contextmanager
def _hub_errors(repository: str, hint: str) -> Iterator[None]:
    """Translate the errors of the hub's client into errors with a hint."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    login = "accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(f"the hub dataset {repository} is gated", hint=login) from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(f"the hub cannot be reached for {repository}", hint=hint) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"the hub has no dataset {repository}, or it is private", hint=login) from error
    except EntryNotFoundError as error:
        raise DownloadError(f"{repository} does not have that file: {_first_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"the hub cannot be reached for {repository}", hint=hint) from error
    except HfHubHTTPError as error:
        raise DownloadError(f"the hub refused {repository}: {_first_line(error)}", hint=login) from error
    except FileNotFoundError as error:
        helps = login if "gated" in str(error) else hint
        raise DownloadError(f"the hub dataset {repository} was not found or cannot be reached: {_first_line(error)}", hint=helps) from error
    except _transport_errors() as error:
        raise DownloadError(f"the hub cannot be reached for {repository}", hint=hint) from error
    except ValueError as error:
        several = "name one with --subset" if "Config name is missing" in str(error) else None
        raise DataError(f"cannot read {repository}: {_first_line(error)}", hint=several) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
