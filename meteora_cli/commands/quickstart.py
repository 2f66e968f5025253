"""``meteora quickstart``: everything, once, on a real model and real data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.console import console, emit_json, out, progress, settings_from

if TYPE_CHECKING:
    from rich.table import Table

    from meteora_core.quickstart import QuickstartResult

_MODELS = {"base": "base", "adapter": "own adapter (PEFT)", "meteora": "MeteoRA"}


def quickstart(
    ctx: typer.Context,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder; default: runs/quickstart.", show_default=False)] = None,
    adapter_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of each adapter.", show_default=False)] = None,
    gate_steps: Annotated[int | None, typer.Option(min=0, help="Optimiser steps of the gates.", show_default=False)] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Test rows of each single task.", show_default=False)] = None,
    composite_rows: Annotated[int | None, typer.Option(min=0, help="Test rows of composite_3; 0 leaves it out.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Watch MeteoRA work: fetch a small model, build three BIG-bench tasks, train three adapters and the gates, compare.

    Takes about ten minutes on two CPU cores. Stop it when you like: the same command goes on where it was.
    """
    settings = settings_from(ctx, model__device=device)
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
    out.print(_table(result, settings.model.base))
    accuracy = result.held_out.get("gate_accuracy")
    if accuracy is not None:
        console.print(f"Gates choose the right adapter for {accuracy:.1%} of the answer tokens of held-out rows (top-1, all layers but the first).")
    console.print(f"Computed in {result.dtype}: {result.why}. Stages, seconds: " + ", ".join(f"{name} {time:.0f}" for name, time in result.seconds.items()))
    console.print("\nTry next:")
    for command, purpose in next_commands(plan.folder):
        console.print(f"  [bold]{command}[/bold]\n    {purpose}", soft_wrap=True)


def _table(result: QuickstartResult, base: str) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{base}: test rows never seen in training",
        caption="accuracy: the answer holds the right one; exact: it is the right one; correct: right sub-tasks per prompt",
    )
    table.add_column("task")
    table.add_column("rows", justify="right")
    table.add_column("metric")
    for label in _MODELS.values():
        table.add_column(label, justify="right")
    for task, models in result.scores.items():
        for metric in ("accuracy", "exact", "bleu", "rougeL", "attempted", "correct"):
            if not any(metric in metrics for metrics in models.values()):
                continue
            cells = [_cell(metric, models.get(model, {}).get(metric)) for model in _MODELS]
            table.add_row(task, str(result.rows[task]), metric, *cells)
    return table


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if metric in ("accuracy", "exact") else f"{value:.2f}" if metric in ("rougeL", "attempted", "correct") else f"{value:.1f}"
