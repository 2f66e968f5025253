"""Comparison of several results files: as a table, as Markdown, and as a bar or radar chart.

Reads the results files of :mod:`meteora_core.evaluation.results` and of lm-evaluation-harness, which have the same format.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from meteora_core.errors import DataError, MeteoraError, UsageError, did_you_mean
from meteora_core.evaluation.results import load_results
from meteora_core.files import atomic_write

__all__ = [
    "Cell",
    "Comparison",
    "Line",
    "as_document",
    "compare",
    "figures",
    "find_results",
    "headline_metric",
    "headlines",
    "load_results",
    "model_name",
    "plot",
    "save_figure",
    "to_markdown",
]

KINDS = ("bar", "radar")
FORMATS = ("png", "svg", "pdf")

_HEADLINES = ("acc", "correct", "exact_match", "bleu", "rougeL")


@dataclass(frozen=True)
class Cell:
    """One figure of the table.

    Attributes:
        value: Value of the metric.
        stderr: Standard error of the value; None if there is none.
    """

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Line:
    """One metric of one task in every run.

    Attributes:
        task: Name of the task.
        metric: Name of the metric, followed by a comma and lm-evaluation-harness's filter unless that is ``none``.
        higher_is_better: Whether larger values are better.
        cells: Figure of each run; None if the run lacks it.
        samples: Number of rows that each run has scored; None if it is not known.
    """

    task: str
    metric: str
    higher_is_better: bool
    cells: tuple[Cell | None, ...]
    samples: tuple[int | None, ...]

    @property
    def best(self) -> tuple[int, ...]:
        """Indices of the runs with the best value; empty if there are fewer than two values or all are equal."""
        values = {run: cell.value for run, cell in enumerate(self.cells) if cell is not None}
        if len(set(values.values())) < 2:
            return ()
        best = max(values.values()) if self.higher_is_better else min(values.values())
        return tuple(run for run, value in values.items() if value == best)


@dataclass(frozen=True)
class Comparison:
    """A table of several runs.

    Attributes:
        columns: Distinct names of the runs.
        rows: Lines of the table, one per task and metric, in the order of the results files.
    """

    columns: tuple[str, ...]
    rows: tuple[Line, ...]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Find the paths for :func:`load_results`. A folder that directly contains no results is replaced by its sub-folders with results.

    Args:
        paths: Files and folders that the user named.

    Raises:
        DataError: A path does not exist, or a folder contains no results.
    """
    results: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}", hint="name results files, or folders that `meteora eval` wrote")
        if path.is_file() or any(path.glob("results_*.json")):
            results.append(path)
            continue
        subfolders = sorted(folder for folder in path.iterdir() if folder.is_dir() and any(folder.glob("results_*.json")))
        if not subfolders:
            raise DataError(f"no results in {path}", hint="run `meteora eval --save` first")
        results += subfolders
    return results


def as_document(comparison: Comparison, files: Sequence[Path]) -> dict[str, Any]:
    """The comparison as plain values for JSON: ``runs`` (name and path), and ``rows`` with a value and a standard error for each run."""
    rows = []
    for line in comparison.rows:
        cells = [None if cell is None else {"value": cell.value, "stderr": cell.stderr} for cell in line.cells]
        rows.append(
            {
                "task": line.task,
                "metric": line.metric,
                "higher_is_better": line.higher_is_better,
                "samples": list(line.samples),
                "values": cells,
                "best": list(line.best),
            }
        )
    return {"runs": [{"name": name, "path": str(file)} for name, file in zip(comparison.columns, files, strict=True)], "rows": rows}


def compare(documents: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Comparison:
    """Combine the documents of several results files into one table.

    Args:
        documents: Results documents, as :func:`load_results` returns them.
        labels: Names of the columns; None means the names of the models, with a number appended to repeated ones.

    Raises:
        UsageError: There are no documents, or the number of labels differs from that of documents.
    """
    if not documents:
        raise UsageError("no results to compare", hint="name at least one results file or folder")
    if labels is not None and len(labels) != len(documents):
        raise UsageError(f"there are {len(labels)} labels for {len(documents)} results", hint="give one label for each results file or folder")
    names = list(labels) if labels is not None else [model_name(document) for document in documents]
    tables = [figures(document) for document in documents]
    tasks = dict.fromkeys(task for table in tables for task in table)
    rows = []
    for task in tasks:
        metrics = dict.fromkeys(metric for table in tables for metric in table.get(task, {}))
        samples = tuple(_samples(document, task) if task in tasks_of else None for document, tasks_of in zip(documents, tables, strict=True))
        for metric in metrics:
            cells = tuple(table.get(task, {}).get(metric) for table in tables)
            rows.append(Line(task, metric, all(_higher(document, task, metric) for document in documents), cells, samples))
    return Comparison(tuple(_distinct(names)), tuple(rows))


def to_markdown(comparison: Comparison, digits: int = 3) -> str:
    """The table as GitHub-flavoured Markdown, with the best value of each row in bold.

    Args:
        comparison: Table of several runs.
        digits: Number of decimal places; BLEU has two less.
    """
    header = ["task", "metric", "rows", *comparison.columns]
    lines = [_markdown_row(header), "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
    for row in comparison.rows:
        decimals = max(digits - 2, 0) if row.metric.rpartition("/")[2].startswith("bleu") else digits
        sizes = sorted({size for size in row.samples if size is not None})
        counted = "–" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        cells = [_cell(cell, decimals, run in row.best) for run, cell in enumerate(row.cells)]
        lines.append(_markdown_row([row.task, row.metric, counted, *cells]))
    return "\n".join(lines) + "\n"


def headlines(comparison: Comparison) -> dict[str, tuple[float | None, ...]]:
    """One figure between 0 and 1 per task and run, for charts.

    It is the first of these that the task has: accuracy, a composite's correct answers (as a share of the sub-tasks with an accuracy), BLEU / 100, ROUGE-L.

    Returns:
        For each task the values in the order of the columns. Tasks with none of these metrics are left out.
    """
    by_task: dict[str, dict[str, Line]] = {}
    for row in comparison.rows:
        by_task.setdefault(row.task, {})[row.metric.partition(",")[0]] = row
    values: dict[str, tuple[float | None, ...]] = {}
    for task, rows in by_task.items():
        metric = headline_metric(rows)
        if metric is None:
            continue
        scale = 100.0 if metric == "bleu" else 1.0
        if metric == "correct":
            scale = float(sum(name.endswith("/acc") for name in rows)) or 1.0
        values[task] = tuple(None if cell is None else cell.value / scale for cell in rows[metric].cells)
    return values


def headline_metric(metrics: Mapping[str, Any]) -> str | None:
    """The name of a task's main metric: accuracy, a composite's correct answers, BLEU or ROUGE-L; None if it has none of them."""
    return next((name for name in _HEADLINES if name in metrics), None)


def plot(comparison: Comparison, path: Path, kind: str = "bar") -> Path:
    """Draw the :func:`headlines` of all tasks as a chart, with one colour per run.

    Args:
        comparison: Table of several runs.
        path: File to write, whose name ends in ``.png``, ``.svg`` or ``.pdf``.
        kind: Kind of chart: ``"bar"`` or ``"radar"``. A radar chart shows only tasks that every run has, and needs at least three.

    Returns:
        ``path``.

    Raises:
        MeteoraError: matplotlib is not installed.
        UsageError: The kind or the ending of the file name is unknown, or there are too few tasks.
        StorageError: The file cannot be written.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of chart {kind!r}", hint=did_you_mean(kind, KINDS) or "use bar or radar")
    _ending(path)
    values = headlines(comparison)
    if kind == "radar":
        values = {task: cells for task, cells in values.items() if None not in cells}
    if len(values) < (3 if kind == "radar" else 1):
        raise UsageError(f"{len(values)} tasks are too few for a {kind} chart", hint="use bar" if kind == "radar" and values else None)
    draw = _bars if kind == "bar" else _radar
    return save_figure(lambda figure_type: draw(figure_type, comparison.columns, values), path)


def _ending(path: Path) -> str:
    """The ending of a picture's file name. Raises UsageError if it is not in :data:`FORMATS`."""
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UsageError(f"cannot draw {path.name}", hint=f"end the file's name in {', '.join('.' + name for name in FORMATS)}")
    return ending


def save_figure(draw: Callable[[Any], Any], path: Path) -> Path:
    """Draw a picture with matplotlib and write it atomically.

    Args:
        draw: Function that makes the figure from matplotlib's class ``Figure``.
        path: File to write, whose name ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        MeteoraError: matplotlib is not installed.
        UsageError: The ending of the file name is unknown.
        StorageError: The file cannot be written.
    """
    path = Path(path)
    ending = _ending(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeteoraError("matplotlib is not installed", hint="pip install 'meteora-lora[plot]'") from error
    figure = draw(Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending, dpi=150, bbox_inches="tight")
    with atomic_write(path, "wb") as handle:
        handle.write(buffer.getvalue())
    return path


def _bars(figure_type: Any, columns: Sequence[str], values: Mapping[str, tuple[float | None, ...]]) -> Any:
    figure = figure_type(figsize=(8, 1.2 + 0.25 * len(values) * (len(columns) + 1)))
    axes = figure.add_subplot()
    height = 0.8 / len(columns)
    for run, column in enumerate(columns):
        shown = [(index, cells[run]) for index, cells in enumerate(values.values()) if cells[run] is not None]
        positions = [index + (run - (len(columns) - 1) / 2) * height for index, _ in shown]
        axes.barh(positions, [value for _, value in shown], height=height, label=column)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, share of correct sub-tasks, BLEU / 100, or ROUGE-L")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(columns), 4))
    return figure


def _radar(figure_type: Any, columns: Sequence[str], values: Mapping[str, tuple[float | None, ...]]) -> Any:
    figure = figure_type(figsize=(8, 8))
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * index / len(values) for index in range(len(values))]
    for run, column in enumerate(columns):
        line = [cells[run] for cells in values.values()]
        axes.plot([*angles, angles[0]], [*line, line[0]], label=column)
        axes.fill([*angles, angles[0]], [*line, line[0]], alpha=0.1)
    axes.set_xticks(angles, list(values))
    axes.tick_params(axis="x", pad=18)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=min(len(columns), 4))
    return figure


def _cell(cell: Cell | None, digits: int, best: bool) -> str:
    if cell is None:
        return "–"
    value = f"{cell.value:.{digits}f}"
    return (f"**{value}**" if best else value) + (f" ± {cell.stderr:.{digits}f}" if cell.stderr is not None else "")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _distinct(names: Sequence[str]) -> list[str]:
    distinct: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in distinct:
            number, candidate = number + 1, f"{name} ({number})"
        distinct.append(candidate)
    return distinct


def model_name(document: Mapping[str, Any]) -> str:
    config = document.get("config")
    return str(document.get("model_name") or (config.get("model") if isinstance(config, Mapping) else None) or "model")


def figures(document: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """The figures of a results document by task and metric. Values that are not finite numbers are left out."""
    figures: dict[str, dict[str, Cell]] = {}
    for task, values in document["results"].items():
        if not isinstance(values, Mapping):
            continue
        cells: dict[str, Cell] = {}
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if name.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            cells[name if filter_name in ("", "none") else key] = Cell(float(value), float(error) if _is_number(error) else None)
        figures[task] = cells
    return figures


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _samples(document: Mapping[str, Any], task: str) -> int | None:
    samples = document.get("n-samples", {}).get(task, {})
    size = samples.get("effective") if isinstance(samples, Mapping) else None
    return size if type(size) is int and size >= 0 else None


def _higher(document: Mapping[str, Any], task: str, metric: str) -> bool:
    directions = document.get("higher_is_better", {}).get(task, {})
    return not (isinstance(directions, Mapping) and directions.get(metric.partition(",")[0]) is False)
