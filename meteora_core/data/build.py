"""Building of datasets: raw rows become ``DIR/<task>/{train,test}.jsonl`` and a manifest."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

from meteora_core.data.extract import Extract
from meteora_core.data.manifest import Manifest, intact, read_manifest, write_manifest
from meteora_core.data.rows import Row, Split, split_path
from meteora_core.data.sources import extract
from meteora_core.data.tasks import BigBench, Files, Task, get_task
from meteora_core.data.writer import check_target, dataset_folder, prompt_key, write_rows
from meteora_core.errors import DataError, MeteoraError, UsageError
from meteora_core.names import folder_of
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import MOST_PROCESSES, MOST_ROWS, check_range
from meteora_core.workers import end_processes, follow_parent, interrupts_held


@dataclass(frozen=True)
class BuildRequest:
    """The source and the size of datasets to build.

    Attributes:
        source: Source of the raw rows, one of :data:`meteora_core.data.sources.SOURCES`.
        raw_dir: Folder of raw rows, for the local source.
        max_train: Largest number of train rows. Rows are shuffled within each raw file; for BIG-bench tasks of several files, the files follow one another.
        max_test: Largest number of test rows.
        force: Whether to build a dataset again that exists and is intact.
    """

    source: str = "auto"
    raw_dir: Path | str | None = None
    max_train: int | None = None
    max_test: int | None = None
    force: bool = False

    def check(self) -> None:
        """Raise UsageError for a number of rows that is out of range."""
        for option, value in (("max_train", self.max_train), ("max_test", self.max_test)):
            if value is not None:
                check_range(option, value, 1, MOST_ROWS)


def build_task(
    name: str | Task,
    out_dir: Path | str,
    *,
    source: str = "auto",
    raw_dir: Path | str | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Build one dataset into ``out_dir/<task>``. An earlier build that fits the request is kept.

    Args:
        name: The task, or its name.
        out_dir: Folder of all datasets.
        source, raw_dir, max_train, max_test, force: Fields of :class:`BuildRequest`.
        progress: Receiver of progress reports, in bytes and rows.

    Returns:
        The dataset's manifest.

    Raises:
        UsageError: An argument is wrong or the task is unknown.
        DataError: The raw rows are broken or missing, a split is empty, or the folder holds another dataset; or the task was added, its source is not
            known any more, and the dataset would change.
        DownloadError: A source cannot be reached.
        StorageError: The dataset cannot be written.
    """
    task = get_task(name) if isinstance(name, str) else name
    return _build(task, out_dir, BuildRequest(source, raw_dir, max_train, max_test, force), progress)


def _build(task: Task, out_dir: Path | str, request: BuildRequest, progress: Progress = SILENT) -> Manifest:
    """:func:`build_task` for a request."""
    request.check()
    folder = folder_of(out_dir, task.name)
    check_target(folder, task.name)
    if isinstance(task.source, Files) and Path(task.source.train).resolve() == split_path(out_dir, task.name, "train").resolve():
        return _built_from_itself(task, folder, keep=not request.force and request.max_train is None and request.max_test is None)
    if not request.force:
        built = existing(task, out_dir, request)
        if built is not None:
            return built
    raw = extract(task, request.source, None if request.raw_dir is None else Path(request.raw_dir), progress)
    return _write(task, folder, raw, {"train": request.max_train, "test": request.max_test}, progress)


def _built_from_itself(task: Task, folder: Path, *, keep: bool) -> Manifest:
    """The manifest of a dataset whose raw rows are not known any more, if it is intact and may be kept. Raises DataError otherwise."""
    manifest = read_manifest(folder)
    if keep and manifest is not None and intact(folder, manifest):
        return manifest
    raise DataError(
        f"{folder} cannot be built again: the source of {task.name} is not known (it was added by `meteora data add`)",
        hint=f"add it again from its own files: meteora data add {task.name} --train FILE",
    )


def existing(task: Task, out_dir: Path | str, request: BuildRequest) -> Manifest | None:
    """The manifest of an earlier, intact build for the same request; None if there is none, or if local files may have changed since."""
    if request.raw_dir is not None or request.source == "local" or isinstance(task.source, Files):
        return None
    folder = Path(out_dir) / task.name
    manifest = read_manifest(folder)
    if manifest is None or (manifest.max_train, manifest.max_test) != (request.max_train, request.max_test):
        return None
    if request.source not in ("auto", manifest.source.get("kind")):
        return None
    return manifest if intact(folder, manifest) else None


def build_tasks(
    names: Sequence[str],
    out_dir: Path | str,
    request: BuildRequest = BuildRequest(),
    *,
    jobs: int = 1,
    failures: dict[str, MeteoraError] | None = None,
    progress: Progress = SILENT,
) -> list[Manifest]:
    """Build several datasets; see :func:`build_task`.

    Args:
        names: Names of the tasks.
        out_dir: Folder of all datasets.
        request: Source and size of the datasets.
        jobs: Number of processes that build at the same time. Archives are fetched and unpacked once, before the processes start.
        failures: Dictionary that collects errors by task, while the other tasks are built; None to stop at the first error.
        progress: Receiver of progress reports, in bytes, and in rows (for one process) or finished tasks (for several).

    Returns:
        The manifests in the order of ``names``, without those of tasks that failed.

    Raises:
        MeteoraError: The errors of :func:`build_task`. Datasets that were finished before are kept.
    """
    check_range("jobs", jobs, 1, MOST_PROCESSES)
    tasks = [get_task(name) for name in dict.fromkeys(names)]
    build = partial(_build, out_dir=out_dir, request=request)
    jobs = min(jobs, len(tasks))
    done: dict[str, Manifest] = {}

    def collect(name: str, finish: Callable[[], Manifest]) -> None:
        try:
            done[name] = finish()
        except UsageError:
            raise
        except MeteoraError as error:
            if failures is None:
                raise
            failures[name] = error

    if jobs <= 1:
        for task in tasks:
            collect(task.name, partial(build, task, progress=progress))
        return list(done.values())
    waiting = [task for task in tasks if request.force or existing(task, out_dir, request) is None]
    _prepare(waiting, request, progress)
    with progress.task("building", total=len(tasks), unit="tasks") as bar, _worker_pool(jobs) as pool:
        with interrupts_held():  # submitting starts the workers, which must not receive Ctrl-C
            running: dict[Future[Manifest], str] = {pool.submit(build, task): task.name for task in tasks}
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                try:
                    collect(name, future.result)
                except BrokenProcessPool as died:
                    raise MeteoraError(
                        "a process that built datasets was killed", hint="if memory ran out, lower --jobs; the same command continues the build"
                    ) from died
                bar.update(1, task=name)
    return [done[task.name] for task in tasks if task.name in done]


@contextmanager
def _worker_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that end if the block fails: they are asked to stop, so that they remove unfinished files, and are then killed."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        end_processes(workers)
        raise
    pool.shutdown()


def _begin_worker() -> None:
    """Set up a worker: it ignores Ctrl-C, which the parent handles, and ends when its parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_working)
    follow_parent()


def _stop_working(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _prepare(tasks: Sequence[Task], request: BuildRequest, progress: Progress) -> None:
    """Fetch and unpack the shared archive before several processes need it."""
    shared = next((task for task in tasks if isinstance(task.source, BigBench)), None)
    if shared is not None and (request.source == "pypi" or (request.source == "auto" and request.raw_dir is None)):
        extract(shared, request.source, None, progress)


def _write(task: Task, folder: Path, raw: Extract, limits: dict[str, int | None], progress: Progress) -> Manifest:
    total = _total(raw, limits)
    entries = {}
    trained: set[bytes] = set()
    repeated = 0
    with dataset_folder(folder, task.name) as work, progress.task(f"building {task.name}", total=total, unit="rows") as bar:
        for split in raw.splits:

            def rows(split: Split = split) -> Iterator[Row]:
                nonlocal repeated
                for row in islice(raw.rows(split), limits[split]):
                    key = prompt_key(row)
                    if split == "train":
                        trained.add(key)
                    elif key in trained:
                        repeated += 1
                    yield row

            entry = write_rows(work / f"{split}.jsonl", rows(), bar)
            if entry.rows == 0:
                hint = "give more rows, or separate test rows with --test FILE" if isinstance(task.source, Files) else None
                raise DataError(f"the {split} split of {task.name} is empty in this source", hint=hint)
            asked = limits[split]
            if asked is not None and entry.rows < asked:
                progress.note(f"{task.name}: the source has {entry.rows} {split} rows, fewer than the {asked} that were asked for")
            entries[f"{split}.jsonl"] = entry
        duplicates = {"dropped": raw.duplicates_dropped, "test_prompts_in_train": repeated}
        own = task.max_new_tokens if isinstance(task.source, Files) else None
        manifest = Manifest(
            task.name,
            task.metric,
            raw.origin,
            raw.rule,
            raw.seed,
            entries,
            duplicates,
            limits["train"],
            limits["test"],
            task.members,
            max_new_tokens=own,
            frame=raw.frame,
        )
        write_manifest(work, manifest)
    return manifest


def _total(raw: Extract, limits: dict[str, int | None]) -> int | None:
    if not raw.counts:
        return None
    return sum(count if limits[split] is None else min(count, limits[split] or 0) for split, count in raw.counts.items())
