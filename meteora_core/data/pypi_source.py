"""The pypi source: the source distribution of ``bigbench`` 1.0.0, which holds the JSON file of every BIG-bench task.

The archive is read as a stream. Only the required members are written, to the cache, and a task that was unpacked before is read from there.
Nothing in the archive is run or imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from meteora_core.archives import tar_gz_members
from meteora_core.data.extract import Extract
from meteora_core.data.local_source import from_bigbench
from meteora_core.data.tasks import TASKS, BigBench, Task
from meteora_core.errors import DataError
from meteora_core.fetch.download import download, downloads_dir
from meteora_core.fetch.package_index import find_pypi_file
from meteora_core.files import cache_dir, sha256, storage_errors
from meteora_core.locks import scratch_folder, sweep
from meteora_core.progress import SILENT, Progress

PROJECT, VERSION = "bigbench", "1.0.0"
SDIST = f"{PROJECT}-{VERSION}.tar.gz"
SDIST_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_MEMBER = re.compile(r"[^/]+/bigbench/benchmark_tasks/(?P<folder>[^/]+)/(?:(?P<part>[^/]+)/)?task\.json")


def extract_pypi(task: Task, progress: Progress = SILENT) -> Extract:
    """Read a BIG-bench task from the source distribution, downloading it once.

    Raises:
        DataError: The task is not a BIG-bench task, or the archive does not contain it or is broken.
        DownloadError: The archive cannot be fetched.
    """
    if not isinstance(task.source, BigBench):
        raise DataError(f"{task.name} is not a BIG-bench task, so it is not on the package index", hint="use --source hub, or --source local --raw-dir DIR")
    folder = unpacked(task.source.folder, progress)
    return from_bigbench(task, folder, {"kind": "pypi", "name": f"{PROJECT} {VERSION} sdist", "sha256": SDIST_SHA256})


def unpacked_dir() -> Path:
    """The cache folder of unpacked tasks."""
    return cache_dir() / f"{PROJECT}-{VERSION}"


def fetch_sdist(progress: Progress = SILENT) -> Path:
    """Download the source distribution, unless it is in the cache. Raises DownloadError."""
    target = downloads_dir() / SDIST
    if target.is_file() and sha256(target) == SDIST_SHA256:
        return target
    found = find_pypi_file(PROJECT, VERSION, ".tar.gz")
    return download(found.url, target, sha256=SDIST_SHA256, size=found.size, progress=progress, title=SDIST)


def unpacked(folder: str, progress: Progress = SILENT) -> Path:
    """The folder of a task in BIG-bench's repository layout, which is unpacked if it is not in the cache.

    All tasks of the table are unpacked in one pass over the archive, because a pass takes most of the time.

    Raises:
        DataError: The archive is broken or unsafe, or does not contain the task.
        DownloadError: The archive cannot be fetched.
    """
    from filelock import FileLock

    root = unpacked_dir()
    sweep_unpacked(root)
    if (root / folder).is_dir():
        return root / folder
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if not (root / folder).is_dir():
            table = {task.source.folder for task in TASKS.values() if isinstance(task.source, BigBench)}
            wanted = {name for name in table | {folder} if not (root / name).is_dir()}
            unpack(fetch_sdist(progress), wanted, root, progress)
    if not (root / folder).is_dir():
        raise DataError(f"{SDIST} has no task {folder!r}")
    return root / folder


def sweep_unpacked(root: Path) -> None:
    """Remove unfinished folders of killed processes from ``root``."""
    sweep(root / "unpack")


def unpack(archive: Path, folders: Iterable[str], root: Path, progress: Progress = SILENT) -> list[str]:
    """Write the JSON files of some tasks from a BIG-bench source distribution, as a stream.

    Args:
        archive: Path of the ``.tar.gz`` file.
        folders: Names of the tasks' folders.
        root: Folder to write to, as ``root/<folder>/[<sub-task>/]task.json``. A task is written completely or not at all.
        progress: Receiver of progress reports, in compressed bytes.

    Returns:
        Names of the folders that the archive contains.

    Raises:
        DataError: The archive is broken, too large, or unsafe (see :func:`meteora_core.archives.tar_gz_members`). In this case nothing is written.
    """
    wanted = set(folders)
    size = archive.stat().st_size if archive.is_file() else None
    with ExitStack() as stack:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_if_empty, root)
            work = stack.enter_context(scratch_folder(root, "unpack"))
        with progress.task(f"reading {archive.name}", total=size, unit="B") as task:
            for member, copy in tar_gz_members(archive, task.update):
                match = _MEMBER.fullmatch(member.name)
                if match and member.isfile() and match["folder"] in wanted:
                    _write(copy, work / match["folder"] / (match["part"] or ""))
        found = sorted(entry.name for entry in work.iterdir())
        with storage_errors(root):
            for name in found:
                if not (root / name).exists():
                    (work / name).rename(root / name)
        return found


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _write(copy: Callable[[IO[bytes]], None], folder: Path) -> None:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "task.json", "wb") as target:
            copy(target)
