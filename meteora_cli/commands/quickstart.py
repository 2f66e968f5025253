"""``meteora quickstart``: the complete workflow with a real model and real data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.console import emit_json, progress, settings_from
from meteora_cli.display import DataTable, out, say
from meteora_core.text import printable

if TYPE_CHECKING:
    from meteora_core.settings import Settings
    from meteora_core.starter.run import RoutedAnswer

_MODELS = {"base": "base", "adapter": "own adapter (PEFT)", "meteora": "MeteoRA"}


def quickstart(
    ctx: typer.Context,
    train: Annotated[bool, typer.Option("--train", help="Train adapters and gates, even if the package contains a trained starter checkpoint.")] = False,
    out_dir: Annotated[
        Path | None, typer.Option("--out", "--output-dir", help="Folder of all results; default: runs/quickstart, or runs/starter.", show_default=False)
    ] = None,
    adapter_steps: Annotated[int | None, typer.Option(min=1, help="Number of optimiser steps for each adapter.", show_default=False)] = None,
    gate_steps: Annotated[int | None, typer.Option(min=0, help="Number of optimiser steps for the gates.", show_default=False)] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Number of test rows for each single task.", show_default=False)] = None,
    composite_rows: Annotated[
        int | None, typer.Option(min=0, help="Number of test rows that ask a question of each of three tasks; 0 leaves them out.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda, cuda:1 or mps.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Try MeteoRA with a small model and three BIG-bench tasks.

    By default, compare the starter checkpoint with its base model and draw the routing of an answer in colour, in one to two minutes on two CPU cores. With
    --train, or if the package has no starter checkpoint, train three adapters and the gates and compare them with the base model, in about ten minutes. An
    interrupted run resumes when the same command is run again.
    """
    from meteora_core.ranges import check_range

    for flag, value in {"--adapter-steps": adapter_steps, "--gate-steps": gate_steps, "--test-rows": test_rows, "--composite-rows": composite_rows}.items():
        if value is not None:
            check_range(flag, value, 0, 10**6)
    settings = settings_from(ctx, model__device=device)
    from meteora_core.starter import starter_checkpoint

    starter = None if train or adapter_steps is not None or gate_steps is not None else starter_checkpoint()
    if starter is not None and _fits(starter, settings.model.base):
        _starter(ctx, settings, starter, out_dir, test_rows=test_rows, composite_rows=composite_rows, as_json=as_json)
        return
    from meteora_core.model.base import BaseReference
    from meteora_core.quickstart import QuickstartPlan, next_commands, run_quickstart

    sizes: dict[str, Any] = {"adapter_steps": adapter_steps, "gate_steps": gate_steps, "test_rows": test_rows, "composite_rows": composite_rows}
    plan = QuickstartPlan(out_dir or settings.paths.runs / "quickstart", **{name: value for name, value in sizes.items() if value is not None})
    base = BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code)
    with progress(ctx) as bars:
        result = run_quickstart(plan, base, settings.model.device, progress=bars)
    if as_json:
        emit_json(
            {
                "scores": result.scores,
                "rows": result.rows,
                "held_out": result.held_out,
                "checkpoint": str(result.checkpoint),
                "dtype": result.dtype,
                "seconds": result.seconds,
            }
        )
        return
    out.print(_table(result.scores, result.rows, settings.model.base, _MODELS))
    accuracy = result.held_out.get("gate_accuracy")
    if accuracy is not None:
        say(f"Gates choose the right adapter for {accuracy:.1%} of the answer tokens of held-out rows (top-1, all layers but the first).")
    say(f"Computed in {result.dtype}: {result.why}. Stages, seconds: " + ", ".join(f"{name} {time:.0f}" for name, time in result.seconds.items()))
    _next(next_commands(plan.folder))


def _fits(starter: Path, base: str) -> bool:
    """Whether the starter checkpoint belongs to the base model that the settings name."""
    from meteora_core.checkpoints.native import read_config

    return bool(read_config(starter)["base"]["name"] == base)


def _starter(
    ctx: typer.Context, settings: Settings, checkpoint: Path, out_dir: Path | None, *, test_rows: int | None, composite_rows: int | None, as_json: bool
) -> None:
    """Compare the starter checkpoint with its base model, and draw its routing."""
    from meteora_core.starter.run import StarterPlan, next_commands, run_starter

    sizes: dict[str, Any] = {"test_rows": test_rows, "composite_rows": composite_rows}
    plan = StarterPlan(out_dir or settings.paths.runs / "starter", checkpoint, **{name: value for name, value in sizes.items() if value is not None})
    with progress(ctx) as bars:
        result = run_starter(plan, settings.model.device, data_source=settings.data.source, raw_dir=settings.data.raw_dir, progress=bars)
    if as_json:
        emit_json({**asdict(result), "checkpoint": str(result.checkpoint), "pictures": [str(path) for path in result.pictures]})
        return
    out.print(_table(result.scores, result.rows, settings.model.base, {"base": "base", "meteora": "MeteoRA (starter)"}, result.intervals))
    if result.answer is not None:
        _draw(result.answer)
    if result.own_share is not None:
        say(f"In the picture's answer {result.own_share:.0%} of the tokens' first choices are adapters of the prompt's tasks (all layers).")
    say(f"Computed in {result.dtype}: {result.why}. Stages, seconds: " + ", ".join(f"{name} {time:.0f}" for name, time in result.seconds.items()))
    for picture in result.pictures:
        say(f"saved {picture}")
    _next(next_commands(plan))


def _draw(answer: RoutedAnswer) -> None:
    """Print the answer of the picture with every token in the colour of its adapter, and a legend."""
    from rich.text import Text

    from meteora_cli.chat.render import Painter

    painter = Painter(out, answer.names)
    text, legend = Text(), Text("adapters: ")
    for token, adapter, weight in answer.tokens:
        for part, style in painter.pieces(printable(token, multiline=True), adapter, weight):
            text.append(part, style)
    for adapter in dict.fromkeys(adapter for _, adapter, _ in answer.tokens):
        mark, style = painter.swatch(adapter)
        legend.append(mark, style).append(f" {printable(answer.names[adapter])}  ")
    out.print("The answer to a prompt of three tasks, by the adapter that most layers chose for each token:")
    out.print(text)
    out.print(legend)


def _next(commands: list[tuple[str, str]]) -> None:
    say("")
    say("Try next:")
    for command, purpose in commands:
        say(f"  {command}", style="bold")
        say(f"    {purpose}")


Intervals = dict[str, dict[str, dict[str, "tuple[float, float] | None"]]]


def _table(
    scores: dict[str, dict[str, dict[str, float]]], rows: dict[str, int], base: str, labels: dict[str, str], intervals: Intervals | None = None
) -> DataTable:
    table = DataTable(
        title=f"{base}: test rows that were not used in training",
        caption="accuracy: the answer contains the reference; exact: it equals the reference; correct: number of correct sub-tasks per prompt"
        + ("; in brackets: 95 % interval" if intervals else ""),
    )
    table.add_column("task")
    table.add_column("rows", justify="right")
    table.add_column("metric")
    for label in labels.values():
        table.add_column(label, justify="right")
    for task, models in scores.items():
        for metric in ("accuracy", "exact", "bleu", "rougeL", "attempted", "correct"):
            if not any(metric in metrics for metrics in models.values()):
                continue
            if intervals and metric not in ("accuracy", "exact") and any("accuracy" in metrics for metrics in models.values()):
                continue  # with intervals, one line per task
            known = intervals[task] if intervals else {}
            cells = [_cell(metric, models.get(model, {}).get(metric), known.get(model, {}).get(metric)) for model in labels]
            table.add_row(task, str(rows[task]), metric, *cells)
    return table


def _cell(metric: str, value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "–"
    low, high = interval or (0.0, 0.0)
    if metric in ("accuracy", "exact"):
        return f"{value:.1%}" + (f" ({low * 100:.0f} to {high * 100:.0f})" if interval else "")
    digits = 2 if metric == "rougeL" or (metric in ("attempted", "correct") and not interval) else 1
    return f"{value:.{digits}f}" + (f" ({max(low, 0.0):.{digits}f} to {high:.{digits}f})" if interval else "")
