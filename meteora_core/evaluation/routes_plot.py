"""The routing of several tasks as heat maps: tasks by adapters, and layers by tasks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteora_core.errors import MeteoraError
from meteora_core.evaluation.routes import RoutingSummary
from meteora_core.files import atomic_write

WRITTEN_OUT = 12
"""Maximum number of adapters and of tasks for which the squares show their values."""


def plot_routing(summaries: Mapping[str, RoutingSummary], path: Path) -> Path:
    """Draw how often each adapter was the top-1 adapter of each task, and how often the top-1 adapter of each layer was the task's own.

    Only answer tokens count.

    Args:
        summaries: Counts of at least one task, by name.
        path: File to write, in PNG format.

    Returns:
        ``path``.

    Raises:
        MeteoraError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeteoraError("matplotlib is not installed", hint="pip install 'meteora-lora[plot]'") from error
    tasks, first = list(summaries), next(iter(summaries.values()))
    own = {task: values for task, summary in summaries.items() if (values := summary.own_by_layer("answer")) is not None}
    width = max(4.0, 0.4 * len(first.names)) + (max(2.5, 0.4 * len(own)) + 3.5 if own else 0)
    figure = Figure(figsize=(width + 3, max(3.5, 0.35 * len(tasks) + 2.5, 0.012 * len(first.paths) + 3 if own else 0)), layout="constrained")
    ratios = [max(4.0, 0.4 * len(first.names)), max(2.5, 0.4 * len(own))]
    axes = figure.subplots(1, 2, width_ratios=ratios, squeeze=False)[0] if own else [figure.add_subplot()]
    matrix = [summaries[task].shares("top1", "answer").tolist() for task in tasks]
    image = _squares(axes[0], matrix, list(first.names), tasks, "share of answer tokens, all layers, by top-1 adapter")
    if own:
        by_layer = [[float(values[layer]) for values in own.values()] for layer in range(len(first.paths))]
        _squares(axes[1], by_layer, list(own), None, "top-1 is the task's own, by layer")
        ticks = list(range(0, len(first.paths), max(1, len(first.paths) // 30)))
        axes[1].set_yticks(ticks, [_short(first.paths[tick]) for tick in ticks], fontsize=6)
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with atomic_write(path, "wb") as handle:
        handle.write(buffer.getvalue())
    return path


def _squares(axes: Any, values: list[list[float]], columns: list[str], rows: list[str] | None, title: str) -> Any:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_title(title, fontsize=9)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        if len(columns) <= WRITTEN_OUT and len(rows) <= WRITTEN_OUT:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    return image


def _short(path: str) -> str:
    """Shorten a module path: ``model.layers.3.self_attn.q_proj`` becomes ``3 q_proj``."""
    parts = path.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1]}".strip()
