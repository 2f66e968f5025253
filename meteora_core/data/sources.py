"""The choice of the source of a task's raw rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meteora_core.data.extract import Extract, NotHere
from meteora_core.data.formats.own import extract_own
from meteora_core.data.local_source import extract_local, from_bigbench
from meteora_core.data.pypi_source import extract_pypi, sweep_unpacked, unpack
from meteora_core.data.tasks import BigBench, Combined, Files, Task
from meteora_core.errors import DataError, DownloadError, MeteoraError, UsageError, did_you_mean
from meteora_core.files import cache_dir, sha256
from meteora_core.progress import SILENT, Progress

SOURCES = ("auto", "local", "pypi", "hub", "authors")
"""``auto`` tries the others in this order."""


def extract(task: Task, source: str = "auto", raw_dir: Path | None = None, progress: Progress = SILENT) -> Extract:
    """Open a task's raw rows.

    Args:
        task: The task.
        source: Name of the source, one of :data:`SOURCES`.
        raw_dir: Folder of raw tasks, or BIG-bench's source distribution as a file, for the local source.
        progress: Receiver of progress reports.

    Raises:
        UsageError: There is no such source, or ``local`` lacks ``raw_dir``.
        DataError: No source has the task, or its files are broken.
        DownloadError: The requested source cannot be reached.
    """
    tried = candidates(task, source, raw_dir)
    if isinstance(task.source, Files):
        return extract_own(task, progress)
    if len(tried) == 1:
        return _open(task, tried[0], raw_dir, progress)
    failures: list[str] = []
    for candidate in tried:
        try:
            return _open(task, candidate, raw_dir, progress)
        except (NotHere, DownloadError) as missing:
            failures.append(f"{candidate}: {missing.message}")
    raise DataError(f"no source has {task.name} ({'; '.join(failures)})", hint="name a folder of raw rows with --raw-dir DIR, or check the network connection")


def candidates(task: Task, source: str = "auto", raw_dir: Path | None = None) -> list[str]:
    """The sources that will be tried for a task, in order.

    Raises:
        UsageError: The source is unknown or does not fit the task, or ``local`` lacks ``raw_dir``.
    """
    if source not in SOURCES:
        raise UsageError(f"unknown source {source!r}", hint=did_you_mean(source, SOURCES) or f"one of {', '.join(SOURCES)}")
    if isinstance(task.source, Files):
        return ["local"]
    if isinstance(task.source, Combined) and source not in ("local", "authors"):
        raise UsageError(f"{task.name} is made of other tasks", hint=f"run `meteora data composite --n {len(task.members)}`")
    if source == "local" and raw_dir is None:
        raise UsageError("the local source needs a folder of raw tasks", hint="name it with --raw-dir DIR")
    if source == "pypi" and not isinstance(task.source, BigBench):
        raise UsageError(f"{task.name} is not a BIG-bench task, so it is not on the package index", hint="use --source hub, or --source local --raw-dir DIR")
    if source != "auto":
        return [source]
    names = ["local"] if raw_dir is not None else []
    if isinstance(task.source, BigBench):
        names.append("pypi")
    return [*names, "hub", "authors"]


def _open(task: Task, source: str, raw_dir: Path | None, progress: Progress) -> Extract:
    if source == "local":
        assert raw_dir is not None
        return _from_archive(task, raw_dir, progress) if raw_dir.is_file() else extract_local(task, raw_dir)
    if source == "pypi":
        return extract_pypi(task, progress)
    from meteora_core.data import hub_source

    opener: Callable[[Task], Extract] = hub_source.extract_hub if source == "hub" else hub_source.extract_authors
    try:
        return opener(task)
    except MeteoraError:
        raise
    except OSError as error:
        raise DownloadError(f"cannot read {task.name} from the hub: {error}", hint="check the network connection and the free disk space") from error


def _from_archive(task: Task, archive: Path, progress: Progress) -> Extract:
    """Read a BIG-bench task from a source distribution on the user's disk."""
    if not isinstance(task.source, BigBench):
        raise NotHere(f"{task.name} is not a BIG-bench task, so it is not in {archive.name}")
    digest = sha256(archive)
    root = cache_dir() / "archives" / digest[:16]
    sweep_unpacked(root)
    if not (root / task.source.folder).is_dir():
        unpack(archive, [task.source.folder], root, progress)
    if not (root / task.source.folder).is_dir():
        raise NotHere(f"{archive} has no task {task.source.folder!r}")
    return from_bigbench(task, root / task.source.folder, {"kind": "local", "name": archive.name, "sha256": digest})
