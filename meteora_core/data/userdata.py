"""The user's tasks: added by ``data add``, declared in the settings, or found as built datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from meteora_core.data.build import build_task
from meteora_core.data.formats.columns import template_fields
from meteora_core.data.formats.reading import Reading, Tokenizer
from meteora_core.data.frames import PLACE, Frame
from meteora_core.data.manifest import Manifest, nested_members, read_manifest
from meteora_core.data.rows import Row, available_tasks, split_path
from meteora_core.data.sources import extract
from meteora_core.data.tasks import METRICS, RESERVED, TASKS, Files, Metric, Task, composite_task, get_task, register_task
from meteora_core.data.writer import check_target
from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.names import folder_of, is_name
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import MOST_TOKENS, check_range

if TYPE_CHECKING:
    from meteora_core.settings import Settings

DEFAULT_TOKENS = 128


def own_task(
    name: str,
    *,
    train: Path | str,
    test: Path | str | None = None,
    metric: str = "exact",
    reading: Reading | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """Register a user's task.

    Args:
        name: Name of the task and of its folder.
        train: A data file, a folder of one dataset, a saved ``datasets`` folder or a hub dataset; see :func:`meteora_core.data.formats.sources.open_source`.
        test: The same for the test rows; None for those of ``train``, or for 20 % of its train rows, drawn with seed 42, if it has none.
        metric: Metric of the task, one of :data:`meteora_core.data.tasks.METRICS`.
        reading: Rules by which records become rows; None to detect everything.
        max_new_tokens: Largest number of tokens of an answer.

    Raises:
        UsageError: The metric is unknown, a template is broken, or the name is taken or not valid.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", hint=did_you_mean(metric, METRICS) or f"one of {', '.join(METRICS)}")
    if max_new_tokens is not None:
        check_range("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    for text in (None, None) if reading is None else (reading.template, reading.target):
        if text is not None and PLACE not in text:
            template_fields(text)
    task = Task(name, None, cast(Metric, metric), Files(train, test, reading), max_new_tokens=max_new_tokens or DEFAULT_TOKENS)
    register_task(task)
    return task


def add_task(task: Task, data_dir: Path | str, progress: Progress = SILENT, *, max_train: int | None = None, max_test: int | None = None) -> Manifest:
    """Build the dataset of a user's task. The errors are those of :func:`meteora_core.data.build.build_task`."""
    return build_task(task, data_dir, max_train=max_train, max_test=max_test, progress=progress)


@dataclass(frozen=True)
class Preview:
    """A preview of a user's task.

    Attributes:
        rows: Number of rows of each split.
        columns: Format that was recognised.
        frame: Frame of the prompts.
        example: First row, as the model will read it.
    """

    rows: dict[str, int]
    columns: str
    frame: Frame
    example: Row


def preview(task: Task, data_dir: Path | str, progress: Progress = SILENT) -> Preview:
    """Read a user's task without writing a dataset.

    Raises:
        DataError: A file is missing, broken or empty, or the target folder holds another dataset.
    """
    check_target(folder_of(data_dir, task.name), task.name)
    raw = extract(task, progress=progress)
    counts = {str(split): sum(1 for _ in raw.rows(split)) for split in raw.splits}
    for split, count in counts.items():
        if count == 0:
            raise DataError(f"the {split} split of {task.name} is empty", hint="give more rows, or separate test rows with --test FILE")
    assert raw.frame is not None
    assert raw.example is not None
    return Preview(counts, str(raw.origin["columns"]), raw.frame, raw.example)


_DECLARED = ("train", "test", "metric", "max_new_tokens", "columns", "template", "target")


def register_settings(tasks: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> list[Task]:
    """Register the tasks that the settings declare.

    Args:
        tasks: Declarations by name: objects or dictionaries with ``train``, ``test``, ``metric``, ``max_new_tokens``, ``columns``, ``template`` and
            ``target`` (``Settings.tasks``).
        tokenizer: Function that loads the base model's tokenizer, for tasks that need its chat template.

    Raises:
        UsageError: A declaration is wrong.
    """
    registered = []
    for name, declared in tasks.items():
        values = declared if isinstance(declared, Mapping) else {key: getattr(declared, key, None) for key in _DECLARED}
        train = values.get("train")
        if train is None:
            raise UsageError(f"task {name!r} in the settings has no train file")
        columns = tuple((values.get("columns") or {}).items())
        reading = Reading(columns, values.get("template"), values.get("target"), tokenizer=tokenizer)
        metric = values.get("metric") or "exact"
        registered.append(own_task(name, train=train, test=values.get("test"), metric=metric, reading=reading, max_new_tokens=values.get("max_new_tokens")))
    return registered


def register_built(data_dir: Path | str) -> list[Task]:
    """Register the datasets in ``data_dir`` that are not in the table: the user's tasks, and composites of other lists of tasks.

    Datasets whose manifest is missing or broken are skipped; ``data verify`` reports them.
    """
    registered = []
    for name in available_tasks(data_dir):
        if name in TASKS:
            continue
        try:
            task = _built(Path(data_dir), name)
        except (DataError, UsageError):
            continue
        if task is not None:
            register_task(task)
            registered.append(task)
    return registered


def register_all(settings: Settings, tokenizer: Tokenizer | None = None) -> None:
    """Register every task that the settings declare, and every dataset in their data folder. Raises UsageError for a wrong declaration."""
    register_settings(settings.tasks, tokenizer)
    register_built(settings.paths.data)


def task_in(data_dir: Path | str, name: str) -> Task:
    """The task of a name, from the table or from the built datasets.

    A composite that was built from another list of tasks than the default has the members of its manifest.

    Raises:
        UsageError: There is no such task; the hint suggests the closest name.
        DataError: The dataset is broken, and the task is not in the table.
    """
    if name not in RESERVED and is_name(name):
        try:
            task = _built(Path(data_dir), name)
        except DataError:
            if name not in TASKS:
                raise
            task = None
        if task is not None and (name not in TASKS or task.is_composite):
            return task
    return get_task(name)


def _built(data_dir: Path, name: str) -> Task | None:
    manifest = read_manifest(data_dir / name)
    if manifest is None or manifest.task != name:
        return None
    if nested := nested_members(data_dir, manifest):
        what = "itself" if name in nested else f"the composite {nested[0]}"
        raise DataError(f"{data_dir / name} is broken: its manifest names {what} as a member", hint="build the composite again under another name")
    if manifest.members:
        return composite_task(manifest.members, name, resolve=lambda member: task_in(data_dir, member))
    if manifest.metric not in get_args(Metric):
        return None
    task = Task(name, None, cast(Metric, manifest.metric), Files(split_path(data_dir, name, "train"), split_path(data_dir, name, "test")))
    return replace(task, max_new_tokens=manifest.max_new_tokens or DEFAULT_TOKENS)
