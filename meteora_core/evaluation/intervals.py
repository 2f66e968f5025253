"""95 % intervals of single scores."""

from __future__ import annotations

import math

NORMAL_95 = 1.959964
"""The number of standard errors on either side of a normal variable's mean that hold 95 % of it."""

PROPORTIONS = ("accuracy", "exact")
"""Metrics that are a share of the rows."""


def wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """The interval of a proportion by Wilson's score method (1927), which also holds for few rows and for shares of 0 and 1.

    ``(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` with ``z = 1.96``.

    Args:
        share: Share of the rows, between 0 and 1.
        rows: Number of rows, at least 1.

    Example:
        >>> [round(limit, 3) for limit in wilson_interval(0.0, 40)]
        [0.0, 0.088]
    """
    square = NORMAL_95**2 / rows
    middle = share + square / 2
    half = NORMAL_95 * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def score_interval(metric: str, value: float, stderr: float | None, rows: int) -> tuple[float, float] | None:
    """The interval of a metric: Wilson's for a share of the rows, or else 1.96 standard errors on either side; None without a standard error.

    Args:
        metric: Name of the metric.
        value: Value of the metric.
        stderr: Standard error of the value.
        rows: Number of rows that were scored.
    """
    if metric in PROPORTIONS and rows:
        return wilson_interval(value, rows)
    return None if stderr is None else (value - NORMAL_95 * stderr, value + NORMAL_95 * stderr)
