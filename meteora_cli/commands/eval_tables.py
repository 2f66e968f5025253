"""The tables that ``meteora eval`` and ``meteora eval report`` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from meteora_cli.display import DataTable, body, cell

if TYPE_CHECKING:
    from meteora_core.evaluation.evaluate import ModelResults
    from meteora_core.evaluation.oracle_shares import OracleShare
    from meteora_core.evaluation.report import Cell, Comparison
    from meteora_core.evaluation.runner import TaskResult

DEBUG_ROWS = 10
"""The number of rows of each task that ``--debug`` shows."""

WIDE = 8
"""The largest number of adapters for which a table has one column each."""


def result_line(model: str, result: TaskResult) -> str:
    """Return one line with the main metric of a task."""
    from meteora_core.evaluation.runner import headline

    if not result.samples:
        return f"{model}: {result.task.name}: all {result.skipped} prompts skipped as too long"
    name, value = headline(result)
    skipped = f" ({result.skipped} skipped as too long)" if result.skipped else ""
    return f"{model}: {result.task.name}: {name} {value:.3f} over {len(result.samples)} rows{skipped}, {result.seconds:.0f} s"


def results_table(outcomes: list[ModelResults]) -> DataTable:
    """Return the table of all metrics with their standard errors, with one column per model."""
    table = DataTable()
    table.add_column("task")
    table.add_column("metric")
    table.add_column("rows", justify="right")
    for outcome in outcomes:
        table.add_column(outcome.model, justify="right")
    tasks = dict.fromkeys(task for outcome in outcomes for task in outcome.results)
    for task in tasks:
        metrics = dict.fromkeys(metric for outcome in outcomes if task in outcome.results for metric in outcome.results[task].scores.metrics)
        results = [outcome.results[task] for outcome in outcomes if task in outcome.results]
        rows, skipped = max(len(result.samples) for result in results), max(result.skipped for result in results)
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
    "empty_responses": ("empty answer", "empty answers"),
    "over_long_responses": ("over-long answer", "over-long answers"),
    "unusable_references": ("reference that cannot be scored", "references that cannot be scored"),
}


def short_warnings(result: TaskResult) -> list[str]:
    """Return the warnings about a task: counts of problematic rows, and notes of the run."""
    counts = ((result.scores.counts.get(key, 0), nouns) for key, nouns in _COUNTS.items())
    parts = [f"{count} {one if count == 1 else several}" for count, (one, several) in counts if count]
    if result.skipped and result.samples:
        parts.append(f"{result.skipped} prompts skipped as too long")
    return [*parts, *result.notes]


def warnings_of(outcomes: list[ModelResults]) -> list[str]:
    """Return one line for each task and model with warnings."""
    return [
        f"{outcome.model}: {task}: {', '.join(parts)}" for outcome in outcomes for task, result in outcome.results.items() if (parts := short_warnings(result))
    ]


def speed_line(outcomes: list[ModelResults]) -> str | None:
    """Return the speed of each model, relative to the base model if that was evaluated too; None if all rows were done before."""
    speeds = {outcome.model: outcome.document["meteora"]["speed"] for outcome in outcomes}
    base = speeds.get("base", {})

    def figure(model: str, key: str, unit: str) -> str:
        value = speeds[model][key]
        relative = f" ({value / base[key]:.2f} x base)" if model != "base" and base.get(key) else ""
        return f"{value:.4g} {unit}{relative}"

    kinds = (("rows_per_second", "rows/s"), ("tokens_per_second", "new tokens/s"), ("all_tokens_per_second", "tokens/s with prompts"))
    parts = [f"{model} " + ", ".join(figure(model, *kind) for kind in kinds) for model in speeds if speeds[model]["rows"]]
    return "speed: " + "; ".join(parts) if parts else None


def samples_table(model: str, result: TaskResult) -> DataTable:
    """Return the table of prompt, answer and reference of the first rows."""
    rows: list[dict[str, Any]] = result.scores.rows or []
    table = DataTable("prompt", "answer", "reference", title=f"{model}: {result.task.name}", show_lines=True)
    for index, sample in enumerate(result.samples[:DEBUG_ROWS]):
        correct = (rows[index] if index < len(rows) else {}).get("accuracy")
        style = "" if correct is None else "green" if correct else "red"
        table.add_row(body(sample.row.prompt[-600:]), body(sample.response, style), body(sample.row.response))
    return table


def routing_table(outcome: ModelResults) -> DataTable | None:
    """Return the table of each adapter's share of the top-1 choices for answer tokens, by task, over all layers; None if routing was not counted.

    With more than :data:`WIDE` adapters, the table shows only the three that were chosen most often.
    """
    counted = {task: result.routing for task, result in outcome.results.items() if result.routing is not None}
    if not counted:
        return None
    names = next(iter(counted.values())).names
    wide = len(names) > WIDE
    table = DataTable("task", title="routing: top-1 adapters of the answers' tokens, all layers")
    for column in ("own, answer", "own, all", *(["most chosen"] if wide else names)):
        table.add_column(column, justify="left" if column == "most chosen" else "right")
    for task, routing in counted.items():
        own = ["–" if (share := routing.own_share(part)) is None else f"{share:.1%}" for part in ("answer", "all")]
        shares = routing.shares("top1", "answer").tolist()
        best = sorted(range(len(names)), key=lambda index: (-shares[index], index))
        if wide:
            cells = [cell(", ".join(f"{names[index]} {shares[index]:.1%}" for index in best[:3]))]
        else:
            cells = [Text(f"{share:.1%}", style="bold" if names[index] in routing.own else "") for index, share in enumerate(shares)]
        table.add_row(task, *own, *cells)
    return table


def comparison_table(comparison: Comparison) -> DataTable:
    """Return the table that compares several runs, with the best value of each row in bold."""
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
        cells = [Text(_figure(cell, digits), style="bold green" if index in line.best else "") for index, cell in enumerate(line.cells)]
        table.add_row(line.task, line.metric, rows, *cells)
    return table


def shares_table(shares: Sequence[OracleShare], oracle: str) -> DataTable:
    """Return the table of scores relative to the oracle's, in per cent, with 95 % intervals and the best in bold."""
    from meteora_core.evaluation.oracle_shares import interval

    table = DataTable("model")
    for column in ("tasks", "runs", f"share of {oracle}", "95 % interval"):
        table.add_column(column, justify="right")
    best = max(share.share for share in shares)
    for share in shares:
        figure = Text(f"{share.share:.1%}", style="bold green" if share.share == best and len(shares) > 1 else "")
        table.add_row(share.model, str(len(share.tasks)), str(share.runs), figure, interval(share))
    return table


def _figure(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "–"
    return f"{cell.value:.{digits}f}" + (f" ± {cell.stderr:.{digits}f}" if cell.stderr is not None else "")
