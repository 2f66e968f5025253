"""Scores of a task's responses: pure functions of responses and references, with no model in sight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meteora_core.choices import Scoring
from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.evaluation.clean import answer_only
from meteora_core.evaluation.composite_items import split_items, split_references
from meteora_core.evaluation.metrics import SCORINGS, as_text, contains, exact_match, final_number_match, yes_no_match
from meteora_core.evaluation.text_metrics import ROUGES, bleu_counts, bleu_of_counts, bleu_stderr, paper_bleu, rouge

Row = dict[str, float | None]
"""One row's own values by metric; None where the metric leaves the row out."""

_VERDICTS: dict[str, Callable[[str, str, Scoring], bool | None]] = {
    "exact": exact_match,
    "contains": contains,
    "final_number": final_number_match,
    "yes_no_text": yes_no_match,
}
_BLEU = frozenset({"bleu", "text", "yes_no_text"})
_ROUGE = frozenset({"text", "yes_no_text"})
_HARNESS_NAMES = {"accuracy": "acc"}


@dataclass
class Scores:
    """All that scoring one task gives.

    Args:
        metrics: ``accuracy`` (0 to 1), ``bleu`` (0 to 100), ``rouge1``, ``rouge2`` and ``rougeL`` (F, 0 to 1), as far as the task has them. A composite has
            ``attempted`` and ``correct`` (sub-tasks per prompt) and each sub-task's metrics as ``<subtask>/<metric>``.
        stderr: The standard error of each metric, None where there is none.
        rows: Each row's own values, in the order of the responses. Corpus BLEU has none.
        counts: ``samples``, ``empty_responses``, ``over_long_responses`` (more than twice the reference's words) and ``unusable_references`` (empty, or
            without the number or the yes or no that the metric needs; corrected scoring leaves those rows out of that metric).
    """

    metrics: dict[str, float]
    stderr: dict[str, float | None]
    rows: list[Row]
    counts: dict[str, int] = field(default_factory=dict)


def score(task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected") -> dict[str, float]:
    """Score the responses to a task's prompts.

    Args:
        task: The task's name, or the task itself.
        responses: Response texts as :func:`meteora_core.evaluation.clean_response` gives them for the same scoring mode. None counts as empty.
        references: The wanted response of each; those of a composite row joined by ``@@@@`` and a line end.
        scoring: ``"corrected"``, or ``"paper"`` for the authors' figures, faults included.

    Returns:
        Metric to value, unrounded: ``accuracy`` 0 to 1, ``bleu`` 0 to 100, ``rouge1``, ``rouge2``, ``rougeL`` 0 to 1; for a composite ``attempted``,
        ``correct`` and ``<subtask>/<metric>``. A metric with no row to judge is 0.

    Raises:
        UsageError: The task or the scoring mode is unknown.
        DataError: There are not as many references as responses; in paper scoring, a composite's reference lacks parts.
    """
    return evaluate_responses(task, responses, references, scoring, bootstrap=0).metrics


def score_rows(task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected") -> list[Row]:
    """Each row's own values: ``accuracy`` 0 or 1, ROUGE; for a composite ``attempted``, ``correct`` and ``<subtask>/<metric>``.

    Corpus BLEU has no value of a row. None stands where a metric leaves the row out. Arguments and errors as for :func:`score`.
    """
    return evaluate_responses(task, responses, references, scoring, bootstrap=0).rows


def evaluate_responses(
    task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected", *, bootstrap: int = 100, seed: int = 1234
) -> Scores:
    """Everything at once: metrics, their standard errors, rows and counts.

    Args:
        task, responses, references, scoring: As for :func:`score`.
        bootstrap: How many resamples give corpus BLEU's standard error; below 2 there is none.
        seed: The seed of the resamples.

    Raises:
        UsageError, DataError: As for :func:`score`.
    """
    found = get_task(task) if isinstance(task, str) else task
    mode = _mode(scoring)
    if len(responses) != len(references):
        raise DataError(f"{found.name} has {len(responses)} responses and {len(references)} references", hint="give one reference for each response")
    texts, wanted = [as_text(text) for text in responses], [as_text(text) for text in references]
    if mode == "corrected":
        texts = [answer_only(text) for text in texts]
    if found.is_composite:
        return _composite(found, texts, wanted, mode, bootstrap, seed)
    return _single(found.metric, texts, wanted, mode, bootstrap, seed)


def harness_metrics(scores: Scores) -> dict[str, float | str]:
    """Metrics and standard errors under lm-evaluation-harness's names: ``acc,none``, ``acc_stderr,none``, ``bleu,none`` and so on; ``"N/A"`` for no error."""
    named: dict[str, float | str] = {}
    for key, value in scores.metrics.items():
        name = harness_name(key)
        error = scores.stderr.get(key)
        named[f"{name},none"] = value
        named[f"{name}_stderr,none"] = "N/A" if error is None else error
    return named


def harness_name(key: str) -> str:
    """lm-evaluation-harness's name of one of our metrics: ``accuracy`` is ``acc``, also behind a sub-task's name."""
    head, slash, metric = key.rpartition("/")
    return head + slash + _HARNESS_NAMES.get(metric, metric)


def _mode(scoring: str) -> Scoring:
    for mode in SCORINGS:
        if scoring == mode:
            return mode
    raise UsageError(f"unknown scoring mode {scoring!r}", hint=did_you_mean(scoring, SCORINGS) or "use corrected or paper")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _stderr(values: Sequence[float]) -> float | None:
    """The standard error of a mean: the sample's standard deviation (n - 1) over the root of n; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _present(rows: Sequence[Mapping[str, float | None]], key: str) -> list[float]:
    return [value for row in rows if (value := row.get(key)) is not None]


def _single(metric: str, responses: list[str], references: list[str], mode: Scoring, bootstrap: int, seed: int) -> Scores:
    rows: list[Row] = [{} for _ in responses]
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    unusable = [not reference.strip() for reference in references]
    verdict = _VERDICTS.get(metric)
    if verdict:
        for index, (response, reference) in enumerate(zip(responses, references, strict=True)):
            made = verdict(response, reference, mode)
            rows[index]["accuracy"] = None if made is None else float(made)
            unusable[index] |= made is None
    if metric in _BLEU:
        metrics["bleu"], stderr["bleu"] = _bleu(responses, references, mode, bootstrap, seed)
    if metric in _ROUGE:
        for row, response, reference in zip(rows, responses, references, strict=True):
            row.update(_rouge_row(response, reference, mode))
    means = (["accuracy"] if verdict else []) + (list(ROUGES) if metric in _ROUGE else [])
    for key in means:
        values = _present(rows, key)
        metrics[key], stderr[key] = _mean(values), _stderr(values)
    order = [key for key in ("accuracy", "bleu", *ROUGES) if key in metrics]
    counts = _counts(responses, references, mode) | {"unusable_references": sum(unusable)}
    return Scores({key: metrics[key] for key in order}, {key: stderr[key] for key in order}, rows, counts)


def _bleu(responses: list[str], references: list[str], mode: Scoring, bootstrap: int, seed: int) -> tuple[float, float | None]:
    if mode == "paper":
        return paper_bleu(responses, references), None
    kept = [(response, reference) for response, reference in zip(responses, references, strict=True) if reference.strip()]
    if not kept:
        return 0.0, None
    counts = bleu_counts([response for response, _ in kept], [reference for _, reference in kept])
    return bleu_of_counts(counts.sum(axis=0)), bleu_stderr(counts, bootstrap, seed)


def _rouge_row(response: str, reference: str, mode: Scoring) -> Row:
    """A row's ROUGE. Paper scoring leaves out what the package cannot score; corrected scoring only an unusable reference, and an empty response scores 0."""
    made = rouge(response, reference)
    if made is not None and (mode == "paper" or reference.strip()):
        return {key: value.f for key, value in made.items()}
    left_out = mode == "paper" or not reference.strip(". \t\r\n\v\f")
    return dict.fromkeys(ROUGES, None if left_out else 0.0)


def _counts(responses: Sequence[str], references: Sequence[str], mode: Scoring) -> dict[str, int]:
    empty = sum(not (text if mode == "paper" else text.strip()) for text in responses)
    sizes = ((len(text.split()), len(wanted.split())) for text, wanted in zip(responses, references, strict=True))
    return {"samples": len(responses), "empty_responses": empty, "over_long_responses": sum(made > 2 * size for made, size in sizes if size)}


def _composite(task: Task, responses: list[str], references: list[str], mode: Scoring, bootstrap: int, seed: int) -> Scores:
    members = task.members
    items = [split_items(response, len(members), mode) for response in responses]
    wanted = [split_references(reference, len(members), mode, row=index) for index, reference in enumerate(references)]
    rows: list[Row] = [{"attempted": float(sum(map(bool, parts))), "correct": 0.0} for parts in items]
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    counts = _counts(responses, references, mode) | {"unusable_references": 0}
    correct = 0.0
    for column, member in enumerate(members):
        made = _single(get_task(member).metric, [parts[column] for parts in items], [parts[column] for parts in wanted], mode, bootstrap, seed)
        key = member if members.count(member) == 1 else f"{member}#{column + 1}"
        metrics.update({f"{key}/{name}": value for name, value in made.metrics.items()})
        stderr.update({f"{key}/{name}": value for name, value in made.stderr.items()})
        counts["unusable_references"] += made.counts["unusable_references"]
        correct += made.metrics.get("accuracy", 0.0)
        for row, part in zip(rows, made.rows, strict=True):
            row.update({f"{key}/{name}": value for name, value in part.items()})
            row["correct"] = (row["correct"] or 0.0) + (part.get("accuracy") or 0.0)
    attempted = _present(rows, "attempted")
    right = _present(rows, "correct")
    head = {"attempted": _mean(attempted), "correct": correct if mode == "paper" else _mean(right)}
    return Scores(head | metrics, {"attempted": _stderr(attempted), "correct": _stderr(right)} | stderr, rows, counts)
