"""Draws the pictures of the report."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.paper.figures import Figure, composite, headlines, own_by_depth
from meteora_core.errors import MeteoraError
from meteora_core.files import atomic_write

MARKED = ("base", "own", "lora_b", "arrow", "meteora")
"""Roles that are shown task by task."""


def draw_all(documents: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], heat_maps: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Draw the pictures for which there are results: bars for single tasks and composites, gate accuracy by depth, and heat maps of routing.

    Raises:
        MeteoraError: matplotlib is not installed.
    """
    made = {}
    figures = {role: found for role in MARKED if role in documents and (found := headlines(documents[role]))}
    if figures:
        made["singles"] = _single_tasks(figures, titles, folder / "singles.png")
    counted = {role: counts for role in documents if (counts := composite(documents[role]))}
    if counted:
        made["composites"] = _composites(counted, titles, folder / "composites.png")
    depths = {role: lines for role in documents if (lines := _depths(documents[role]))}
    if depths:
        made["depth"] = _depth(depths, titles, folder / "gate_accuracy_by_layer.png")
    for role, picture in heat_maps.items():
        made[f"heat_map_{role}"] = folder / f"heat_map_{role}.png"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, made[f"heat_map_{role}"])
    return made


def _single_tasks(figures: Mapping[str, Mapping[str, Figure]], titles: Mapping[str, str], path: Path) -> Path:
    tasks = list(dict.fromkeys(task for found in figures.values() for task in found))
    figure = _figure(8, 1.6 + 0.32 * len(tasks))
    axes = figure.add_subplot()
    for place, (role, found) in enumerate(figures.items()):
        rows = [row + 0.14 * (place - (len(figures) - 1) / 2) for row, task in enumerate(tasks) if task in found]
        shown = [found[task] for task in tasks if task in found]
        errors = [each.stderr for each in shown]
        axes.errorbar([each.value for each in shown], rows, xerr=errors, fmt="osD^v"[place % 5], markersize=4, elinewidth=1, label=titles[role])
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("accuracy, BLEU / 100, or ROUGE-L; bars: one standard error", fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(figures), fontsize=8)
    return _save(figure, path)


def _singles(document: Mapping[str, Any]) -> dict[str, Any]:
    return {task: values for task, values in document["results"].items() if "attempted,none" not in values}


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeteoraError("matplotlib is not installed", hint="pip install 'meteora-lora[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with atomic_write(path, "wb") as handle:
        handle.write(buffer.getvalue())
    return path


def _composites(counted: Mapping[str, Any], titles: Mapping[str, str], path: Path) -> Path:
    tasks = sorted({task for counts in counted.values() for task in counts}, key=lambda name: int(name.rpartition("_")[2]))
    figure = _figure(4.0 * len(tasks), 1.5 + 0.45 * len(counted))
    for place, (task, axes) in enumerate(zip(tasks, figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], strict=True)):
        for row, counts in enumerate(counted.values()):
            if task not in counts:
                continue
            for name, offset, colour in (("attempted", -0.2, "#9ecae1"), ("correct", 0.2, "#2171b5")):
                value = counts[task][name]
                axes.barh(row + offset, value.value, 0.38, xerr=value.stderr, color=colour, label=name if row == 0 else None)
        axes.set_xlim(0, int(task.rpartition("_")[2]))
        axes.set_title(f"{task}, sub-tasks per prompt", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        if place == 0:
            axes.set_yticks(range(len(counted)), [titles[role] for role in counted])
            axes.invert_yaxis()
    handles = [figure.axes[0].barh(0, 0, color=colour) for colour in ("#9ecae1", "#2171b5")]
    figure.legend(handles, ["attempted", "correct"], loc="outside lower center", ncols=2)
    return _save(figure, path)


def _depths(document: Mapping[str, Any]) -> dict[int, float]:
    """The mean over single tasks, by decoder layer."""
    by_depth: dict[int, list[float]] = {}
    for task in _singles(document):
        for depth, share in own_by_depth(document, task).items():
            by_depth.setdefault(depth, []).append(share)
    return {depth: sum(shares) / len(shares) for depth, shares in sorted(by_depth.items())}


def _depth(lines: Mapping[str, Mapping[int, float]], titles: Mapping[str, str], path: Path) -> Path:
    figure = _figure(7, 3.5)
    axes = figure.add_subplot()
    for role, shares in lines.items():
        axes.plot(list(shares), list(shares.values()), marker="o", markersize=3, label=titles[role])
    axes.set_ylim(0, 1)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("share of answer tokens", fontsize=9)
    axes.set_title("The likeliest adapter is the task's own: test rows, mean over single tasks", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)
