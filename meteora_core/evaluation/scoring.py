"""Scores of a task's responses, computed from responses and references alone."""

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
"""Values of one row by metric; None if the metric leaves the row out."""

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
    """The scores of one task.

    Attributes:
        metrics: Metrics of the task, out of ``accuracy`` (0 to 1), ``bleu`` (0 to 100), ``rouge1``, ``rouge2`` and ``rougeL`` (F-measure, 0 to 1). A composite
            has ``attempted`` and ``correct`` (sub-tasks per prompt) and the metrics of each sub-task as ``<subtask>/<metric>``.
        stderr: Standard error of each metric; None if it has none.
        rows: Values of each row, in the order of the responses. They do not include corpus BLEU.
        counts: Numbers of ``samples``, ``empty_responses``, ``over_long_responses`` (more than twice as many words as the reference) and
            ``unusable_references`` (empty, or without the number, yes or no that the metric needs; corrected scoring leaves those rows out of the metric).
    """

    metrics: dict[str, float]
    stderr: dict[str, float | None]
    rows: list[Row]
    counts: dict[str, int] = field(default_factory=dict)


def score(task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected") -> dict[str, float]:
    """Score the responses to a task's prompts.

    Args:
        task: The task or its name.
        responses: Response texts, cleaned by :func:`meteora_core.evaluation.clean_response` for the same scoring mode. None counts as empty.
        references: Reference for each response. The references of a composite row are joined by ``@@@@`` and a line end.
        scoring: ``"corrected"``, or ``"paper"`` for the authors' figures, including the faults of their code.

    Returns:
        Value of each metric, unrounded: ``accuracy`` 0 to 1, ``bleu`` 0 to 100, ``rouge1``, ``rouge2``, ``rougeL`` 0 to 1; for a composite ``attempted``,
        ``correct`` and ``<subtask>/<metric>``. A metric that leaves out all rows is 0.

    Raises:
        UsageError: The task or the scoring mode is unknown.
        DataError: The number of references differs from that of responses, or a composite's reference lacks parts in paper scoring.
    """
    return evaluate_responses(task, responses, references, scoring, bootstrap=0).metrics


def score_rows(task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected") -> list[Row]:
    """Values of each row: ``accuracy`` (0 or 1) and ROUGE; for a composite ``attempted``, ``correct`` and ``<subtask>/<metric>``.

    A value is None if the metric leaves the row out. Corpus BLEU has no values for rows. Arguments and errors are those of :func:`score`.
    """
    return evaluate_responses(task, responses, references, scoring, bootstrap=0).rows


def evaluate_responses(
    task: str | Task, responses: Sequence[Any], references: Sequence[Any], scoring: str = "corrected", *, bootstrap: int = 100, seed: int = 1234
) -> Scores:
    """Score responses, with standard errors, the values of each row, and counts.

    Args:
        task, responses, references, scoring: Arguments of :func:`score`.
        bootstrap: Number of resamples for the standard error of corpus BLEU; below 2 it is None.
        seed: Seed of the resamples.

    Raises:
        UsageError, DataError: As for :func:`score`.
    """
    definition = get_task(task) if isinstance(task, str) else task
    mode = _mode(scoring)
    if len(responses) != len(references):
        raise DataError(f"{definition.name} has {len(responses)} responses and {len(references)} references", hint="give one reference for each response")
    texts, expected = [as_text(text) for text in responses], [as_text(text) for text in references]
    if mode == "corrected":
        texts = [answer_only(text) for text in texts]
    if definition.is_composite:
        return _composite(definition, texts, expected, mode, bootstrap, seed)
    return _single(definition.metric, texts, expected, mode, bootstrap, seed)


def harness_metrics(scores: Scores) -> dict[str, float | str]:
    """Metrics and standard errors by lm-evaluation-harness's names: ``acc,none``, ``acc_stderr,none``, ``bleu,none`` and so on. ``"N/A"`` means no error."""
    named: dict[str, float | str] = {}
    for key, value in scores.metrics.items():
        name = harness_name(key)
        error = scores.stderr.get(key)
        named[f"{name},none"] = value
        named[f"{name}_stderr,none"] = "N/A" if error is None else error
    return named


def harness_name(key: str) -> str:
    """lm-evaluation-harness's name for a metric: ``accuracy`` becomes ``acc``, also after the name of a sub-task."""
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
    """Standard error of a mean: the sample standard deviation (with n - 1) divided by the square root of n; None for fewer than two values."""
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
            correct = verdict(response, reference, mode)
            rows[index]["accuracy"] = None if correct is None else float(correct)
            unusable[index] |= correct is None
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
    pairs = [(response, reference) for response, reference in zip(responses, references, strict=True) if reference.strip()]
    if not pairs:
        return 0.0, None
    counts = bleu_counts([response for response, _ in pairs], [reference for _, reference in pairs])
    return bleu_of_counts(counts.sum(axis=0)), bleu_stderr(counts, bootstrap, seed)


def _rouge_row(response: str, reference: str, mode: Scoring) -> Row:
    """ROUGE of one row.

    Paper scoring leaves out rows that the ``rouge`` package cannot score. Corrected scoring leaves out only unusable references; an empty response scores 0.
    """
    values = rouge(response, reference)
    if values is not None and (mode == "paper" or reference.strip()):
        return {key: value.f for key, value in values.items()}
    left_out = mode == "paper" or not reference.strip(". \t\r\n\v\f")
    return dict.fromkeys(ROUGES, None if left_out else 0.0)


def _counts(responses: Sequence[str], references: Sequence[str], mode: Scoring) -> dict[str, int]:
    empty = sum(not (text if mode == "paper" else text.strip()) for text in responses)
    lengths = ((len(response.split()), len(reference.split())) for response, reference in zip(responses, references, strict=True))
    over_long = sum(length > 2 * reference_length for length, reference_length in lengths if reference_length)
    return {"samples": len(responses), "empty_responses": empty, "over_long_responses": over_long}


def _composite(task: Task, responses: list[str], references: list[str], mode: Scoring, bootstrap: int, seed: int) -> Scores:
    members = task.members
    items = [split_items(response, len(members), mode) for response in responses]
    expected = [split_references(reference, len(members), mode, row=index) for index, reference in enumerate(references)]
    rows: list[Row] = [{"attempted": float(sum(map(bool, parts))), "correct": 0.0} for parts in items]
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    counts = _counts(responses, references, mode) | {"unusable_references": 0}
    correct = 0.0
    for column, member in enumerate(members):
        scores = _single(get_task(member).metric, [parts[column] for parts in items], [parts[column] for parts in expected], mode, bootstrap, seed)
        key = member if members.count(member) == 1 else f"{member}#{column + 1}"
        metrics.update({f"{key}/{name}": value for name, value in scores.metrics.items()})
        stderr.update({f"{key}/{name}": value for name, value in scores.stderr.items()})
        counts["unusable_references"] += scores.counts["unusable_references"]
        correct += scores.metrics.get("accuracy", 0.0)
        for row, part in zip(rows, scores.rows, strict=True):
            row.update({f"{key}/{name}": value for name, value in part.items()})
            row["correct"] = (row["correct"] or 0.0) + (part.get("accuracy") or 0.0)
    attempted = _present(rows, "attempted")
    correct_by_row = _present(rows, "correct")
    head = {"attempted": _mean(attempted), "correct": correct if mode == "paper" else _mean(correct_by_row)}
    return Scores(head | metrics, {"attempted": _stderr(attempted), "correct": _stderr(correct_by_row)} | stderr, rows, counts)
