"""``meteora eval``: answers and scores on test rows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.console import console, emit_json, out, progress, settings_from

if TYPE_CHECKING:
    from rich.table import Table

    from meteora_core.evaluation.runner import TaskResult
    from meteora_core.evaluation.session import ModelResults


class Scoring(StrEnum):
    """What the scores mean."""

    corrected = "corrected"
    paper = "paper"


def evaluate(
    ctx: typer.Context,
    task: Annotated[str, typer.Option(help="Task names, separated by commas; or singles, composites, all (of what is built).")],
    model: Annotated[
        str, typer.Option(help="meteora, base, own (each task's own adapter), an adapter's name or folder, several by commas, or all.")
    ] = "meteora",
    checkpoint: Annotated[Path | None, typer.Option(help="Trained gates; default: runs/meteora, else the quickstart's.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option("--T", help="Routing temperature; default: the task's (1; composites 15 to 30).", show_default=False)
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Adapters per token; default: the checkpoint's.", show_default=False)] = None,
    batch_size: Annotated[str | None, typer.Option(help="Prompts at once: a number or auto.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: the task's.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many test rows.", show_default=False)] = None,
    scoring: Annotated[Scoring | None, typer.Option(help="corrected: what the metrics mean; paper: as the authors computed them.", show_default=False)] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write results and samples under runs/eval; a stopped run goes on.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show prompt, answer and reference of 10 rows.")] = False,
    data: Annotated[Path | None, typer.Option(help="Datasets.", show_default=False)] = None,
    adapters: Annotated[Path | None, typer.Option(help="Adapter folders.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …", show_default=False)] = None,
    backend: Annotated[str | None, typer.Option(help="Mixture kernels: auto, reference, dense, triton.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results document on stdout.")] = False,
) -> None:
    """Generate greedy answers to test rows and score them.

    Example: meteora eval --task logical_deduction,strategyqa --model all --limit 50
    """
    settings = settings_from(
        ctx,
        paths__data=data,
        paths__adapters=adapters,
        model__base=base,
        model__dtype=dtype,
        model__device=device,
        model__backend=backend,
        routing__top_k=top_k,
        routing__temperature=temperature,
        eval__batch_size=int(batch_size) if batch_size and batch_size.lstrip("-").isdigit() else batch_size,
        eval__max_new_tokens=max_new_tokens,
        eval__limit=limit,
        eval__scoring=scoring and scoring.value,
    )
    from meteora_core.data.userdata import register_all
    from meteora_core.evaluation.runner import EvalOptions
    from meteora_core.evaluation.session import EvalPlan, choose_tasks
    from meteora_core.evaluation.session import evaluate as run
    from meteora_core.model.base import BaseReference, pick_device, pick_dtype

    register_all(settings)
    place = pick_device(settings.model.device)
    kind = pick_dtype(settings.model.dtype, place)
    tasks = choose_tasks([name.strip() for name in task.split(",") if name.strip()], settings.paths.data)
    models = ("base", "own", "meteora") if model == "all" else tuple(name.strip() for name in model.split(",") if name.strip())
    plan = EvalPlan(
        tasks=tasks,
        models=models,
        data_dir=settings.paths.data,
        adapters_dir=settings.paths.adapters,
        checkpoint=checkpoint or _default_checkpoint(settings.paths.runs),
        base=BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code),
        backend=settings.model.backend,
        out_dir=settings.paths.runs / "eval" if save else None,
        seed=settings.eval.seed,
        options=EvalOptions(
            batch_size=settings.eval.batch_size,
            max_new_tokens=settings.eval.max_new_tokens,
            max_prompt_tokens=settings.eval.max_prompt_tokens,
            no_repeat_ngram_size=settings.eval.no_repeat_ngram_size,
            limit=settings.eval.limit,
            scoring=settings.eval.scoring,
            temperature=settings.routing.temperature,
            top_k=settings.routing.top_k if "top_k" in settings.routing.model_fields_set else None,
        ),
    )
    with progress(ctx) as bars:
        outcomes = run(plan, device=place, dtype=kind, on_result=lambda name, result: bars.note(_line(name, result)), progress=bars)
    if debug:
        for outcome in outcomes:
            for result in outcome.results.values():
                _show(outcome.model, result)
    if as_json:
        documents = [outcome.document for outcome in outcomes]
        emit_json(documents[0] if len(documents) == 1 else documents)
    else:
        out.print(_table(outcomes))
        for warning in _warnings(outcomes):
            console.print(warning, markup=False)
    for outcome in outcomes:
        if outcome.file is not None:
            console.print(f"saved {outcome.file}", markup=False, soft_wrap=True)


def _default_checkpoint(runs: Path) -> Path:
    own, quick = runs / "meteora", runs / "quickstart" / "meteora"
    return quick if quick.is_dir() and not own.is_dir() else own


def _line(model: str, result: TaskResult) -> str:
    from meteora_core.evaluation.runner import headline

    name, value = headline(result)
    return f"{model}: {result.task.name}: {name} {value:.3f} over {len(result.samples)} rows, {result.seconds:.0f} s"


def _table(outcomes: list[ModelResults]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("task")
    table.add_column("metric")
    table.add_column("rows", justify="right")
    for outcome in outcomes:
        table.add_column(outcome.model, justify="right")
    tasks = dict.fromkeys(task for outcome in outcomes for task in outcome.results)
    for task in tasks:
        metrics = dict.fromkeys(metric for outcome in outcomes if task in outcome.results for metric in outcome.results[task].scores.metrics)
        rows = max(len(outcome.results[task].samples) for outcome in outcomes if task in outcome.results)
        for metric in metrics:
            table.add_row(task, metric, str(rows), *[_cell(outcome.results.get(task), metric) for outcome in outcomes])
        table.add_section()
    return table


def _cell(result: TaskResult | None, metric: str) -> str:
    if result is None or metric not in result.scores.metrics:
        return "–"
    value, error = result.scores.metrics[metric], result.scores.stderr.get(metric)
    digits = 1 if metric.rpartition("/")[2] == "bleu" else 3
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _warnings(outcomes: list[ModelResults]) -> list[str]:
    names = {"empty_responses": "empty answers", "over_long_responses": "over-long answers", "unusable_references": "references that cannot be scored"}
    lines = []
    for outcome in outcomes:
        for task, result in outcome.results.items():
            parts = [f"{result.scores.counts[key]} {text}" for key, text in names.items() if result.scores.counts.get(key)]
            if result.skipped:
                parts.append(f"{result.skipped} prompts skipped as too long")
            if parts or result.notes:
                lines.append(f"{outcome.model}: {task}: {', '.join([*parts, *result.notes])}")
    return lines


def _show(model: str, result: TaskResult) -> None:
    from rich.table import Table
    from rich.text import Text

    rows: list[dict[str, Any]] = result.scores.rows or []
    table = Table("prompt", "answer", "reference", title=f"{model}: {result.task.name}", show_lines=True)
    for place, sample in enumerate(result.samples[:10]):
        right = (rows[place] if place < len(rows) else {}).get("accuracy")
        style = "" if right is None else "green" if right else "red"
        table.add_row(Text(sample.row.prompt[-600:]), Text(sample.response, style=style), Text(sample.row.response))
    console.print(table)
