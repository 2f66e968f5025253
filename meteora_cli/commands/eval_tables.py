"""The tables that ``meteora eval`` and ``meteora eval report`` print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from meteora_cli.display import DataTable, body, cell

if TYPE_CHECKING:
    from meteora_core.evaluation.evaluate import ModelResults
    from meteora_core.evaluation.report import Cell, Comparison
    from meteora_core.evaluation.runner import TaskResult

DEBUG_ROWS = 10
"""How many rows ``--debug`` shows of each task."""

WIDE = 8
"""More adapters than this do not fit a table's columns."""


def result_line(model: str, result: TaskResult) -> str:
    """One task's headline."""
    from meteora_core.evaluation.runner import headline

    if not result.samples:
        return f"{model}: {result.task.name}: all {result.skipped} prompts skipped as too long"
    name, value = headline(result)
    skipped = f" ({result.skipped} skipped as too long)" if result.skipped else ""
    return f"{model}: {result.task.name}: {name} {value:.3f} over {len(result.samples)} rows{skipped}, {result.seconds:.0f} s"


def results_table(outcomes: list[ModelResults]) -> DataTable:
    """All metrics with their standard errors, one column a model."""
    table = DataTable()
    table.add_column("task")
    table.add_column("metric")
    table.add_column("rows", justify="right")
    for outcome in outcomes:
        table.add_column(outcome.model, justify="right")
    tasks = dict.fromkeys(task for outcome in outcomes for task in outcome.results)
    for task in tasks:
        metrics = dict.fromkeys(metric for outcome in outcomes if task in outcome.results for metric in outcome.results[task].scores.metrics)
        found = [outcome.results[task] for outcome in outcomes if task in outcome.results]
        rows, skipped = max(len(result.samples) for result in found), max(result.skipped for result in found)
        counted = f"{rows} ({skipped} skipped)" if skipped else str(rows)
        for metric in metrics or ["–"]:
            table.add_row(task, metric, counted, *[_cell(outcome.results.get(task), metric) for outcome in outcomes])
        table.add_section()
    return table


def _cell(result: TaskResult | None, metric: str) -> str:
    if result is None or metric not in result.scores.metrics:
        return "–"
    value, error = result.scores.metrics[metric], result.scores.stderr.get(metric)
    digits = 1 if metric.rpartition("/")[2] == "bleu" else 3
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


_COUNTS = {
    "empty_responses": "empty answers",
    "over_long_responses": "over-long answers",
    "unusable_references": "references that cannot be scored",
}


def short_warnings(result: TaskResult) -> list[str]:
    """What went wrong with a task's rows: counts, and notes of the run."""
    parts = [f"{result.scores.counts[key]} {text}" for key, text in _COUNTS.items() if result.scores.counts.get(key)]
    if result.skipped and result.samples:
        parts.append(f"{result.skipped} prompts skipped as too long")
    return [*parts, *result.notes]


def warnings_of(outcomes: list[ModelResults]) -> list[str]:
    """One line for each task of each model that has something to say."""
    return [
        f"{outcome.model}: {task}: {', '.join(parts)}" for outcome in outcomes for task, result in outcome.results.items() if (parts := short_warnings(result))
    ]


def speed_line(outcomes: list[ModelResults]) -> str | None:
    """How fast each model generated, beside the base where that ran too; None when all rows were done before."""
    speeds = {outcome.model: outcome.document["meteora"]["speed"] for outcome in outcomes}
    base = speeds.get("base", {})

    def figure(model: str, key: str, unit: str) -> str:
        value = speeds[model][key]
        beside = f" ({value / base[key]:.2f} x base)" if model != "base" and base.get(key) else ""
        return f"{value:.4g} {unit}{beside}"

    kinds = (("rows_per_second", "rows/s"), ("tokens_per_second", "new tokens/s"), ("all_tokens_per_second", "tokens/s with prompts"))
    parts = [f"{model} " + ", ".join(figure(model, *kind) for kind in kinds) for model in speeds if speeds[model]["rows"]]
    return "speed: " + "; ".join(parts) if parts else None


def samples_table(model: str, result: TaskResult) -> DataTable:
    """The first rows' prompt, answer and reference side by side."""
    rows: list[dict[str, Any]] = result.scores.rows or []
    table = DataTable("prompt", "answer", "reference", title=f"{model}: {result.task.name}", show_lines=True)
    for place, sample in enumerate(result.samples[:DEBUG_ROWS]):
        right = (rows[place] if place < len(rows) else {}).get("accuracy")
        style = "" if right is None else "green" if right else "red"
        table.add_row(body(sample.row.prompt[-600:]), body(sample.response, style), body(sample.row.response))
    return table


def routing_table(outcome: ModelResults) -> DataTable | None:
    """Tasks by adapters: the share of answer tokens whose top-1 adapter it was, over all layers; None when no routing was counted.

    With more than :data:`WIDE` adapters, the three most chosen stand for all.
    """
    found = {task: result.routing for task, result in outcome.results.items() if result.routing is not None}
    if not found:
        return None
    names = next(iter(found.values())).names
    wide = len(names) > WIDE
    table = DataTable("task", title="routing: top-1 adapters of the answers' tokens, all layers")
    for column in ("own, answer", "own, all", *(["most chosen"] if wide else names)):
        table.add_column(column, justify="left" if column == "most chosen" else "right")
    for task, routing in found.items():
        own = ["–" if (share := routing.own_share(part)) is None else f"{share:.1%}" for part in ("answer", "all")]
        shares = routing.shares("top1", "answer").tolist()
        best = sorted(range(len(names)), key=lambda place: (-shares[place], place))
        if wide:
            cells = [cell(", ".join(f"{names[place]} {shares[place]:.1%}" for place in best[:3]))]
        else:
            cells = [Text(f"{share:.1%}", style="bold" if names[place] in routing.own else "") for place, share in enumerate(shares)]
        table.add_row(task, *own, *cells)
    return table


def comparison_table(comparison: Comparison) -> DataTable:
    """Several runs side by side, the best value of each row in bold."""
    table = DataTable("task", "metric")
    table.add_column("rows", justify="right")
    for column in comparison.columns:
        table.add_column(column, justify="right")
    last = None
    for line in comparison.rows:
        if last not in (None, line.task):
            table.add_section()
        last = line.task
        sizes = sorted({size for size in line.samples if size is not None})
        rows = "–" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        digits = 1 if line.metric.rpartition("/")[2].startswith("bleu") else 3
        cells = [Text(_figure(cell, digits), style="bold green" if place in line.best else "") for place, cell in enumerate(line.cells)]
        table.add_row(line.task, line.metric, rows, *cells)
    return table


def _figure(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "–"
    return f"{cell.value:.{digits}f}" + (f" ± {cell.stderr:.{digits}f}" if cell.stderr is not None else "")
