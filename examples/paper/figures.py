"""Figures from a results document, each with its standard error: a headline figure per task, averages, and gate accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meteora_core.evaluation.report import Cell, compare

SINGLE = ("acc", "bleu", "rougeL")
"""Metrics in order of preference for the headline figure of a single task; BLEU is divided by 100."""


@dataclass(frozen=True)
class Figure:
    """A value and its standard error."""

    value: float
    stderr: float = 0.0

    def __sub__(self, other: Figure) -> Figure:
        """The difference. The errors are treated as independent, which overstates the error if both figures come from the same rows."""
        return Figure(self.value - other.value, math.hypot(self.stderr, other.stderr))

    def times(self, factor: float) -> Figure:
        """The value and its error, scaled."""
        return Figure(self.value * factor, self.stderr * abs(factor))

    @property
    def sign(self) -> int:
        """The sign of the value, or 0 if the value is within two standard errors of 0."""
        return 0 if abs(self.value) <= 2 * self.stderr else int(math.copysign(1, self.value))


def cells(document: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """The figure of each metric, by task and metric."""
    made: dict[str, dict[str, Cell]] = {}
    for line in compare([document]).rows:
        cell = line.cells[0]
        if cell is not None:
            made.setdefault(line.task, {})[line.metric] = cell
    return made


def headlines(document: Mapping[str, Any]) -> dict[str, Figure]:
    """The headline figure of each single task, between 0 and 1."""
    made = {}
    for task, metrics in cells(document).items():
        name = next((metric for metric in SINGLE if metric in metrics), None)
        if name is None or "attempted" in metrics:
            continue
        scale = 0.01 if name == "bleu" else 1.0
        made[task] = Figure(metrics[name].value, metrics[name].stderr or 0.0).times(scale)
    return made


def composite(document: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """For each composite, ``attempted`` and ``correct``: sub-tasks per prompt."""
    return {
        task: {name: Figure(metrics[name].value, metrics[name].stderr or 0.0) for name in ("attempted", "correct")}
        for task, metrics in cells(document).items()
        if {"attempted", "correct"} <= metrics.keys()
    }


def average(figures: Iterable[Figure]) -> Figure:
    """The mean of independent figures."""
    listed = list(figures)
    return Figure(sum(each.value for each in listed) / len(listed), math.sqrt(sum(each.stderr**2 for each in listed)) / len(listed))


def own_by_depth(document: Mapping[str, Any], task: str) -> dict[int, float]:
    """Share of answer tokens whose likeliest adapter is the task's own, by decoder layer; the mean over the layer's linear layers."""
    layers = document.get("meteora", {}).get("routing", {}).get(task, {}).get("own_top1_by_layer", {}).get("answer") or {}
    by_depth: dict[int, list[float]] = {}
    for path, share in layers.items():
        depth = next((int(part) for part in path.split(".") if part.isdigit()), -1)
        by_depth.setdefault(depth, []).append(share)
    return {depth: sum(shares) / len(shares) for depth, shares in sorted(by_depth.items())}


def own_share(document: Mapping[str, Any], task: str) -> float | None:
    """Share of answer tokens whose likeliest adapter is the task's own, over all decoder layers but the first; None if routing was not counted."""
    depths = own_by_depth(document, task)
    kept = [share for depth, share in depths.items() if depth != 0]
    return sum(kept) / len(kept) if kept else None


def slim(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with shares by decoder layer instead of the much longer shares by linear layer."""
    made = dict(document)
    routing = document.get("meteora", {}).get("routing")
    if routing:
        short = {
            task: {
                **{key: value for key, value in values.items() if key != "own_top1_by_layer"},
                "own_top1_by_decoder_layer": {str(depth): round(share, 4) for depth, share in own_by_depth(document, task).items()},
            }
            for task, values in routing.items()
        }
        made["meteora"] = {**document["meteora"], "routing": short}
    return made
