"""The list of tasks and built datasets, the check of built datasets, and the plan of a build."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meteora_core.data.build import BuildRequest, existing
from meteora_core.data.composite import stale_members
from meteora_core.data.manifest import NAME, problems_of, read_manifest
from meteora_core.data.pypi_source import SDIST, unpacked_dir
from meteora_core.data.rows import SPLITS, available_tasks, build_command, split_path
from meteora_core.data.sources import SOURCES, candidates
from meteora_core.data.tasks import TASKS, BigBench, Task, get_task
from meteora_core.data.userdata import task_in
from meteora_core.data.writer import check_target
from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.fetch.download import downloads_dir
from meteora_core.names import check_names
from meteora_core.reading import open_regular, present, read_errors


@dataclass(frozen=True)
class TaskStatus:
    """A line of ``data list``.

    Args:
        name: Name of the task.
        index: Adapter index among the authors' 28 tasks, or None.
        source: Kind of the task's source.
        metric: Metric that scores the task.
        members: Tasks of a composite.
        built: Whether the data folder holds a dataset of the task.
        built_from: Source from which the dataset was built, or None if it is not known.
        rows: Number of rows of each split.
    """

    name: str
    index: int | None
    source: str
    metric: str
    members: tuple[str, ...]
    built: bool
    built_from: str | None
    rows: dict[str, int]


def list_tasks(data_dir: Path | str) -> list[TaskStatus]:
    """Every task that is known or built: the 28 in their order, then composites and the user's tasks."""
    names = list(dict.fromkeys([*TASKS, *available_tasks(data_dir)]))
    return [_status(Path(data_dir), name) for name in names]


def _status(root: Path, name: str) -> TaskStatus:
    try:
        task: Task | None = task_in(root, name)
    except (UsageError, DataError):
        task = None
    folder = root / name
    try:
        manifest = read_manifest(folder)
    except DataError:
        manifest = None
    rows: dict[str, int] = manifest.rows if manifest else {}
    if manifest is None:
        for split in SPLITS:
            with suppress(DataError):  # `data verify` and every use of the dataset report the problem
                if present(split_path(root, name, split)):
                    rows[split] = _lines(split_path(root, name, split))
    origin = str(manifest.source.get("kind")) if manifest else None
    if task is None:
        return TaskStatus(name, None, "unknown", "unknown", (), bool(rows), origin, rows)
    return TaskStatus(name, task.index, task.source.label, task.metric, task.members, bool(rows), origin, rows)


def _lines(path: Path) -> int:
    with open_regular(path) as handle, read_errors(path):
        return sum(1 for line in handle if line.strip())


@dataclass(frozen=True)
class Report:
    """Result of :func:`verify` for one dataset.

    Args:
        task: Name of the dataset's folder.
        ok: Whether there is no problem.
        problems: Problems of the dataset.
        notes: Remarks that are not problems, such as members of a composite that were built again.
        rows: Number of rows of each split in the manifest.
    """

    task: str
    ok: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    rows: dict[str, int]


def verify(data_dir: Path | str, tasks: Sequence[str] | None = None) -> list[Report]:
    """Check built datasets against their manifests: files, hashes, numbers of rows, and the format of every row.

    Args:
        data_dir: Folder of all datasets.
        tasks: Names of the datasets; None for all in the folder.

    Raises:
        DataError: There is no dataset in the folder.
    """
    root = Path(data_dir)
    check_names(tasks or (), "dataset")
    names = list(tasks) if tasks else available_tasks(root)
    if not names:
        raise DataError(f"no datasets in {root}", hint="build one: meteora data build --task NAME")
    return [_report(root, name) for name in names]


def _report(root: Path, name: str) -> Report:
    folder = root / name
    if not folder.is_dir():
        return Report(name, False, (f"{folder} is not built; run `{build_command(name, root)}`",), (), {})
    try:
        manifest = read_manifest(folder)
    except DataError as broken:
        return Report(name, False, (broken.message,), (), {})
    if manifest is None:
        return Report(name, False, (f"{folder} has no {NAME}, so nothing says where it comes from",), (), {})
    problems = tuple(problems_of(folder, manifest))
    notes = tuple(f"{member} was built again since, or is missing" for member in stale_members(root, manifest))
    return Report(name, not problems, problems, notes, manifest.rows)


@dataclass(frozen=True)
class BuildPlan:
    """The effect of a build of one dataset.

    Args:
        task: Name of the task.
        folder: Folder of the dataset.
        action: ``keep`` (the dataset is intact), ``build`` or ``replace``.
        sources: Sources that would be tried, in order.
        download: Archive that would be fetched from the package index first, or None.
    """

    task: str
    folder: str
    action: str
    sources: tuple[str, ...]
    download: str | None


def plan_build(
    names: Sequence[str],
    out_dir: Path | str,
    request: BuildRequest = BuildRequest(),
) -> list[BuildPlan]:
    """The effect of :func:`meteora_core.data.build.build_tasks`, without writing or fetching anything.

    Raises:
        UsageError: A task or the source is unknown, or ``local`` lacks ``raw_dir``.
        DataError: A target folder holds another dataset.
    """
    if request.source not in SOURCES:
        raise UsageError(f"unknown source {request.source!r}", hint=did_you_mean(request.source, SOURCES) or f"one of {', '.join(SOURCES)}")
    request.check()
    plans = []
    for name in names:
        task = get_task(name)
        folder = Path(out_dir) / task.name
        check_target(folder, task.name)
        kept = not request.force and existing(task, out_dir, request) is not None
        tried = candidates(task, request.source, None if request.raw_dir is None else Path(request.raw_dir))
        action = "keep" if kept else "replace" if (folder / NAME).is_file() else "build"
        fetches = not kept and tried[0] == "pypi" and isinstance(task.source, BigBench)
        cached = isinstance(task.source, BigBench) and ((unpacked_dir() / task.source.folder).is_dir() or (downloads_dir() / SDIST).is_file())
        plans.append(BuildPlan(task.name, str(folder), action, tuple(tried), f"{SDIST} (358 MB)" if fetches and not cached else None))
    return plans
