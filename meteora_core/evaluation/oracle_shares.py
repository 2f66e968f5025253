"""Scores of routers as a share of the oracle's, the convention of the field, with intervals over rows and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from meteora_core.errors import DataError, UsageError
from meteora_core.evaluation.intervals import NORMAL_95
from meteora_core.evaluation.report import Cell, figures, headline_metric, model_name, save_figure
from meteora_core.evaluation.router_names import PREFIX, RouterName

ORACLE = "router:oracle"
"""The model whose scores count as 1, unless another is named."""


@dataclass(frozen=True)
class OracleShare:
    """The scores of one model, relative to the oracle's.

    Attributes:
        model: Name of the model, without a seed.
        runs: Number of runs, which differ by their seeds.
        share: Mean over runs and tasks of score / oracle's score.
        low, high: Limits of the 95 % interval; None if the standard error of a score is not known.
        tasks: Share of each task, a mean over runs.
    """

    model: str
    runs: int
    share: float
    low: float | None
    high: float | None
    tasks: dict[str, float]


def oracle_shares(documents: Sequence[Mapping[str, Any]], oracle: str = ORACLE) -> list[OracleShare]:
    """The share of the oracle's score that each model reaches, averaged over tasks.

    With the score ``r`` of run ``s`` on task ``t`` and the oracle's score ``o``, the share is the mean over ``s`` and ``t`` of ``q = r / o``. The variance of
    a task's ``q`` is ``(se_r^2 + q^2 se_o^2) / o^2`` (the delta method, which ignores that both answer the same rows, and so gives intervals that are rather
    too wide). The variance of the share is the sum over tasks of the mean over runs, divided by the squared number of tasks, plus the variance between the
    runs' means divided by their number.

    Args:
        documents: Results documents (:func:`meteora_core.evaluation.results.load_results`). Those of the same model with different seeds, or with the same
            name, are runs of one model.
        oracle: Name of the model whose scores count as 1.

    Returns:
        The shares of all models but the oracle, in the order of the documents.

    Raises:
        UsageError: There is no run of the oracle, or only runs of it.
        DataError: No task with a positive score of the oracle is in all documents.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        runs.setdefault(_without_seed(model_name(document)), []).append(document)
    if oracle not in runs:
        raise UsageError(f"there are no results of {oracle}", hint=f"run `meteora eval` with --model {oracle} too, or name another model with --relative-to")
    best = _headlines(runs.pop(oracle)[-1])
    if not runs:
        raise UsageError(f"there are only results of {oracle}", hint="name the results of other models too")
    scores = {model: [_headlines(document) for document in parts] for model, parts in runs.items()}
    tasks = [task for task, cell in best.items() if cell.value > 0 and all(task in run for parts in scores.values() for run in parts)]
    if not tasks:
        raise DataError(f"no task with a positive score of {oracle} is in all results", hint="evaluate all models on the same tasks")
    return [_share(model, parts, {task: best[task] for task in tasks}) for model, parts in scores.items()]


def _share(model: str, runs: Sequence[Mapping[str, Cell]], best: Mapping[str, Cell]) -> OracleShare:
    shares = [{task: run[task].value / cell.value for task, cell in best.items()} for run in runs]
    by_run = [fmean(run.values()) for run in shares]
    share = fmean(by_run)
    variances = [_variance(run[task], cell) for run in runs for task, cell in best.items()]
    low = high = None
    if None not in variances:
        known = [value for value in variances if value is not None]
        total = sum(known) / len(runs) / len(best) ** 2 + (variance(by_run) / len(by_run) if len(by_run) > 1 else 0.0)
        low, high = share - NORMAL_95 * math.sqrt(total), share + NORMAL_95 * math.sqrt(total)
    return OracleShare(model, len(runs), share, low, high, {task: fmean(run[task] for run in shares) for task in best})


def _variance(score: Cell, best: Cell) -> float | None:
    """The variance of score / best by the delta method; None if a standard error is not known."""
    if score.stderr is None or best.stderr is None:
        return None
    ratio = score.value / best.value
    return (score.stderr**2 + ratio**2 * best.stderr**2) / best.value**2


def _headlines(document: Mapping[str, Any]) -> dict[str, Cell]:
    """The main metric of each task."""
    chosen = {}
    for task, cells in figures(document).items():
        metric = headline_metric(cells)
        if metric is not None:
            chosen[task] = cells[metric]
    return chosen


def _without_seed(model: str) -> str:
    if not model.startswith(PREFIX):
        return model
    try:
        return str(RouterName.parse(model).without_seed)
    except UsageError:
        return model


def shares_document(shares: Sequence[OracleShare], oracle: str) -> dict[str, Any]:
    """The shares as plain values for JSON."""
    return {"relative_to": oracle, "models": [asdict(share) for share in shares]}


def shares_markdown(shares: Sequence[OracleShare], oracle: str) -> str:
    """The shares as a table in GitHub-flavoured Markdown, in per cent, the best in bold."""
    best = max(share.share for share in shares)
    lines = [f"| model | runs | share of {oracle} | 95 % interval |", "| --- | ---: | ---: | ---: |"]
    for share in shares:
        figure = f"{share.share:.1%}"
        lines.append(f"| {share.model} | {share.runs} | {f'**{figure}**' if share.share == best else figure} | {interval(share)} |")
    return "\n".join(lines) + "\n"


def interval(share: OracleShare) -> str:
    """The 95 % interval as text; a dash if it is not known."""
    return "–" if share.low is None or share.high is None else f"{share.low:.1%} to {share.high:.1%}"


def plot_shares(shares: Sequence[OracleShare], oracle: str, path: Path) -> Path:
    """Draw the shares as bars with their intervals, and a line at the oracle.

    Args:
        shares: Shares of several models.
        oracle: Name of the model whose scores count as 1.
        path: File to write, whose name ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        MeteoraError: matplotlib is not installed.
        UsageError: The ending of the file name is unknown.
        StorageError: The file cannot be written.
    """

    def draw(figure_type: Any) -> Any:
        figure = figure_type(figsize=(8, 1.2 + 0.35 * len(shares)))
        axes = figure.add_subplot()
        positions = range(len(shares))
        widths = [0.0 if share.high is None else share.high - share.share for share in shares]
        axes.barh(positions, [share.share for share in shares], xerr=widths, capsize=3)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(positions, [share.model for share in shares])
        axes.invert_yaxis()
        axes.set_xlabel(f"score as a share of {oracle}, with 95 % intervals")
        axes.grid(axis="x", alpha=0.3)
        return figure

    return save_figure(draw, path)
