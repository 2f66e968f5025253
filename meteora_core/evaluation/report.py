"""Results of several runs side by side: a table, Markdown, and a bar or radar picture.

Reads what :mod:`meteora_core.evaluation.results` writes, and results files of lm-evaluation-harness itself, which have the same shape.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from meteora_core.errors import DataError, MeteoraError, UsageError, did_you_mean
from meteora_core.evaluation.results import load_results
from meteora_core.files import atomic_write

__all__ = ["Cell", "Comparison", "Line", "as_document", "compare", "find_results", "headlines", "load_results", "plot", "to_markdown"]

KINDS = ("bar", "radar")
FORMATS = ("png", "svg", "pdf")

_HEADLINES = ("acc", "correct", "exact_match", "bleu", "rougeL")


@dataclass(frozen=True)
class Cell:
    """One figure and its standard error, if there is one."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Line:
    """One metric of one task in every run.

    Args:
        task: The task.
        metric: The metric, with lm-evaluation-harness's filter behind a comma unless that is ``none``.
        higher_is_better: False where a smaller value is better.
        cells: One a run, None where the run lacks it.
        samples: How many rows each run scored, None where that is not known.
    """

    task: str
    metric: str
    higher_is_better: bool
    cells: tuple[Cell | None, ...]
    samples: tuple[int | None, ...]

    @property
    def best(self) -> tuple[int, ...]:
        """The places of the best value; empty for fewer than two values, or when all are equal."""
        values = {place: cell.value for place, cell in enumerate(self.cells) if cell is not None}
        if len(set(values.values())) < 2:
            return ()
        best = max(values.values()) if self.higher_is_better else min(values.values())
        return tuple(place for place, value in values.items() if value == best)


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Args:
        columns: The runs' names, each of them once.
        rows: One per task and metric, in the order in which the runs have them.
    """

    columns: tuple[str, ...]
    rows: tuple[Line, ...]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Turn what a user names into paths for :func:`load_results`: a folder without results of its own stands for its sub-folders that have some.

    Raises:
        DataError: A path is not there, or a folder holds no results.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}", hint="name results files, or folders that `meteora eval` wrote")
        if path.is_file() or any(path.glob("results_*.json")):
            found.append(path)
            continue
        inner = sorted(folder for folder in path.iterdir() if folder.is_dir() and any(folder.glob("results_*.json")))
        if not inner:
            raise DataError(f"no results in {path}", hint="run `meteora eval --save` first")
        found += inner
    return found


def as_document(comparison: Comparison, files: Sequence[Path]) -> dict[str, Any]:
    """The comparison as plain values for JSON: ``runs`` (name and path), and ``rows`` with one value and standard error a run."""
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
    """Lay results documents side by side.

    Args:
        documents: What :func:`load_results` returns.
        labels: The columns' names; default: the models' names, with a number behind those that occur more than once.

    Raises:
        UsageError: There is nothing to compare, or not one label per document.
    """
    if not documents:
        raise UsageError("no results to compare", hint="name one results file or folder at least")
    if labels is not None and len(labels) != len(documents):
        raise UsageError(f"{len(labels)} labels for {len(documents)} results")
    names = list(labels) if labels is not None else [_model_name(document) for document in documents]
    figures = [_figures(document) for document in documents]
    tasks = dict.fromkeys(task for document in figures for task in document)
    rows = []
    for task in tasks:
        metrics = dict.fromkeys(metric for document in figures for metric in document.get(task, {}))
        samples = tuple(_samples(document, task) if task in found else None for document, found in zip(documents, figures, strict=True))
        for metric in metrics:
            cells = tuple(document.get(task, {}).get(metric) for document in figures)
            rows.append(Line(task, metric, all(_higher(document, task, metric) for document in documents), cells, samples))
    return Comparison(tuple(_distinct(names)), tuple(rows))


def to_markdown(comparison: Comparison, digits: int = 3) -> str:
    """The table as GitHub-flavoured Markdown, the best value of each row in bold; BLEU has two digits less than the rest.

    Args:
        comparison: What :func:`compare` returns.
        digits: Digits after the point.
    """
    header = ["task", "metric", "rows", *comparison.columns]
    lines = [_markdown_row(header), "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
    for row in comparison.rows:
        places = max(digits - 2, 0) if row.metric.rpartition("/")[2].startswith("bleu") else digits
        sizes = sorted({size for size in row.samples if size is not None})
        counted = "–" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        cells = [_cell(cell, places, place in row.best) for place, cell in enumerate(row.cells)]
        lines.append(_markdown_row([row.task, row.metric, counted, *cells]))
    return "\n".join(lines) + "\n"


def headlines(comparison: Comparison) -> dict[str, tuple[float | None, ...]]:
    """One figure between 0 and 1 per task and run, for pictures.

    It is the first of accuracy, composite's correct answers (as a share of the sub-tasks that have an accuracy), BLEU / 100 and ROUGE-L that the task has.

    Returns:
        Task to values in the order of the columns; tasks with none of these metrics are left out.
    """
    by_task: dict[str, dict[str, Line]] = {}
    for row in comparison.rows:
        by_task.setdefault(row.task, {})[row.metric.partition(",")[0]] = row
    made: dict[str, tuple[float | None, ...]] = {}
    for task, rows in by_task.items():
        metric = next((name for name in _HEADLINES if name in rows), None)
        if metric is None:
            continue
        scale = 100.0 if metric == "bleu" else 1.0
        if metric == "correct":
            scale = float(sum(name.endswith("/acc") for name in rows)) or 1.0
        made[task] = tuple(None if cell is None else cell.value / scale for cell in rows[metric].cells)
    return made


def plot(comparison: Comparison, path: Path, kind: str = "bar") -> Path:
    """Draw each task's :func:`headlines`, one colour a run.

    Args:
        comparison: What :func:`compare` returns.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
        kind: ``"bar"``, or ``"radar"``, which shows the tasks that every run has and needs three of them.

    Returns:
        ``path``.

    Raises:
        MeteoraError: matplotlib is not installed.
        UsageError: An unknown kind or file name, or too few tasks.
        StorageError: The file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UsageError(f"unknown kind of picture {kind!r}", hint=did_you_mean(kind, KINDS) or "use bar or radar")
    if ending not in FORMATS:
        raise UsageError(f"cannot draw {path.name}", hint=f"end the file's name in {', '.join('.' + name for name in FORMATS)}")
    values = headlines(comparison)
    if kind == "radar":
        values = {task: cells for task, cells in values.items() if None not in cells}
    if len(values) < (3 if kind == "radar" else 1):
        raise UsageError(f"{len(values)} tasks are too few for a {kind} picture", hint="use bar" if kind == "radar" and values else None)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeteoraError("matplotlib is not installed", hint="pip install 'meteora-lora[plot]'") from error
    figure = _bars(Figure, comparison.columns, values) if kind == "bar" else _radar(Figure, comparison.columns, values)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending, dpi=150, bbox_inches="tight")
    with atomic_write(path, "wb") as handle:
        handle.write(buffer.getvalue())
    return path


def _bars(figure_type: Any, columns: Sequence[str], values: Mapping[str, tuple[float | None, ...]]) -> Any:
    figure = figure_type(figsize=(8, 1.2 + 0.25 * len(values) * (len(columns) + 1)))
    axes = figure.add_subplot()
    height = 0.8 / len(columns)
    for place, column in enumerate(columns):
        shown = [(index, cells[place]) for index, cells in enumerate(values.values()) if cells[place] is not None]
        positions = [index + (place - (len(columns) - 1) / 2) * height for index, _ in shown]
        axes.barh(positions, [value for _, value in shown], height=height, label=column)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, share of right sub-tasks, BLEU / 100, or ROUGE-L")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(columns), 4))
    return figure


def _radar(figure_type: Any, columns: Sequence[str], values: Mapping[str, tuple[float | None, ...]]) -> Any:
    figure = figure_type(figsize=(8, 8))
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * index / len(values) for index in range(len(values))]
    for place, column in enumerate(columns):
        line = [cells[place] for cells in values.values()]
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
    made: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in made:
            number, candidate = number + 1, f"{name} ({number})"
        made.append(candidate)
    return made


def _model_name(document: Mapping[str, Any]) -> str:
    config = document.get("config")
    return str(document.get("model_name") or (config.get("model") if isinstance(config, Mapping) else None) or "model")


def _figures(document: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """Task to metric to figure; whatever is no finite number is left out."""
    made: dict[str, dict[str, Cell]] = {}
    for task, values in document["results"].items():
        if not isinstance(values, Mapping):
            continue
        cells: dict[str, Cell] = {}
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if name.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{name}_stderr,{chosen}")
            cells[name if chosen in ("", "none") else key] = Cell(float(value), float(error) if _is_number(error) else None)
        made[task] = cells
    return made


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _samples(document: Mapping[str, Any], task: str) -> int | None:
    found = document.get("n-samples", {}).get(task, {})
    size = found.get("effective") if isinstance(found, Mapping) else None
    return size if type(size) is int and size >= 0 else None


def _higher(document: Mapping[str, Any], task: str, metric: str) -> bool:
    found = document.get("higher_is_better", {}).get(task, {})
    return not (isinstance(found, Mapping) and found.get(metric.partition(",")[0]) is False)
