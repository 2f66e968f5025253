"""``meteora data``: builds, shows and checks datasets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora_cli.commands.data_add import add
from meteora_cli.commands.data_output import DryRun, Json, Out, prepare, show_manifests
from meteora_cli.commands.data_output import show as show_table
from meteora_cli.console import emit_json, progress
from meteora_cli.display import out, panel, say
from meteora_cli.flags import refuse_without_effect
from meteora_cli.typer_app import App

if TYPE_CHECKING:
    pass

app = App(help="Build, show and check datasets.", no_args_is_help=True)

SOURCE_HELP = "Source of raw tasks: auto (tries local, pypi and hub), local, pypi, hub or authors (the rows that the authors built)."


@app.command("build")
def build(
    ctx: typer.Context,
    task: Annotated[list[str], typer.Option("--task", help="Tasks, separated by commas; all: the 28; bigbench: the 22 of BIG-bench.", show_default=False)],
    source: Annotated[str | None, typer.Option("--source", help=SOURCE_HELP, show_default=False)] = None,
    raw_dir: Annotated[
        Path | None, typer.Option("--raw-dir", help="Folder of raw tasks, or the file of BIG-bench's source distribution.", show_default=False)
    ] = None,
    folder: Out = None,
    max_train: Annotated[int | None, typer.Option("--max-train", help="Largest number of train rows per task.", show_default=False)] = None,
    max_test: Annotated[int | None, typer.Option("--max-test", help="Largest number of test rows per task.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Number of processes that build at once.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Build again, even if the dataset exists and is intact.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Build DIR/TASK/{train,test}.jsonl and a manifest from raw tasks."""
    from meteora_core.data.build import BuildRequest, build_tasks
    from meteora_core.data.tasks import expand_names
    from meteora_core.errors import DataError, MeteoraError

    settings, data_dir = prepare(ctx, folder)
    source = source or settings.data.source
    refuse_without_effect(ctx, {"raw_dir": (source in ("auto", "local"), "--source auto or local")})
    raw_dir = raw_dir or settings.data.raw_dir
    request = BuildRequest(
        source,
        raw_dir,
        settings.data.max_train if max_train is None else max_train,
        settings.data.max_test if max_test is None else max_test,
        force,
    )
    names = expand_names(task, source)
    if dry_run:
        from meteora_core.data.catalog import plan_build

        plans = plan_build(names, data_dir, request)
        rows = [(plan.task, plan.action, plan.folder, ", ".join(plan.sources), plan.download or "") for plan in plans]
        show_table([asdict(plan) for plan in plans], ("task", "would", "folder", "sources", "download"), rows, as_json)
        return
    failures: dict[str, MeteoraError] = {}
    several = len(names) > 1
    with progress(ctx) as bars:
        manifests = build_tasks(names, data_dir, request, jobs=jobs, failures=failures if several else None, progress=bars)
    if as_json:
        emit_json({"built": [manifest.to_json() for manifest in manifests], "failed": {name: error.message for name, error in failures.items()}})
    else:
        show_manifests(manifests)
    if failures:
        for name, error in failures.items():
            say(f"{name}: {error.message}")
        hint = next((error.hint for error in failures.values() if error.hint), None)
        raise DataError(f"{len(failures)} of {len(names)} tasks could not be built: {', '.join(failures)}", hint=hint)


@app.command("composite")
def composite(
    ctx: typer.Context,
    n: Annotated[int | None, typer.Option("--n", help="Number of tasks; 3, 5 and 10 select the authors' lists.", show_default=False)] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks, separated by commas, in the order of the prompts.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the dataset; default: composite_N.", show_default=False)] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", help="Number of rows; default: 200, or all if there are fewer.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the row order and the solved examples; 47 combines rows as the authors do.")] = 47,
    examples: Annotated[int, typer.Option("--examples", help="Number of solved examples before the questions.")] = 2,
    folder: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Combine test rows of built datasets, so that each prompt has several tasks."""
    from meteora_core.data.composite import CompositeRequest, build_composite, plan_composite

    _, data_dir = prepare(ctx, folder)
    members = None if tasks is None else [part.strip() for part in tasks.split(",") if part.strip()]
    request = CompositeRequest(n=n, tasks=members, name=name, num_samples=num_samples, seed=seed, examples=examples)
    if dry_run:
        plan = plan_composite(data_dir, request)
        value = {"task": plan.task.name, "members": plan.task.members, "rows": plan.count, "seed": seed, "folder": str(data_dir / plan.task.name)}
        show_table(
            value, ("task", "members", "rows", "folder"), [(plan.task.name, ", ".join(plan.task.members), str(plan.count), str(value["folder"]))], as_json
        )
        return
    with progress(ctx) as bars:
        manifest = build_composite(data_dir, request, progress=bars)
    if as_json:
        emit_json(manifest.to_json())
    else:
        show_manifests([manifest])


app.command("add")(add)


@app.command("list")
def list_(ctx: typer.Context, folder: Out = None, as_json: Json = False) -> None:
    """List all tasks with source, metric, number of rows, and whether they are built."""
    from meteora_core.data.catalog import list_tasks

    _, data_dir = prepare(ctx, folder)
    statuses = list_tasks(data_dir)
    rows = []
    for status in statuses:
        counts = [str(status.rows.get(split, "")) for split in ("train", "test")]
        rows.append(
            ("" if status.index is None else str(status.index), status.name, status.source, status.metric, *counts, _state(status.built, status.built_from))
        )
    show_table([asdict(status) for status in statuses], ("#", "task", "source", "metric", "train", "test", "built"), rows, as_json)


@app.command("show")
def show(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(help="Name of the task.", show_default=False)],
    n: Annotated[int, typer.Option("-n", min=1, max=10**9, help="Number of rows.")] = 1,
    split: Annotated[str, typer.Option("--split", help="Split: train or test.")] = "test",
    folder: Out = None,
    as_json: Json = False,
) -> None:
    """Show rows of a built dataset."""
    from meteora_core.data.rows import SPLITS, read_rows
    from meteora_core.data.userdata import task_in
    from meteora_core.errors import UsageError

    _, data_dir = prepare(ctx, folder)
    known = task_in(data_dir, task)
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}", hint="choose train or test")
    rows = read_rows(data_dir, known.name, split, limit=n)
    if as_json:
        emit_json({"task": known.name, "split": split, "metric": known.metric, "rows": [asdict(row) for row in rows]})
        return
    for number, row in enumerate(rows):
        out.print(panel(row.prompt.rstrip("\n"), f"{known.name} · {split} · row {number}", title_align="left"))
        out.print(panel(row.response, "response", title_align="left", border_style="green"))


@app.command("verify")
def verify(
    ctx: typer.Context,
    tasks: Annotated[list[str] | None, typer.Argument(help="Datasets to check; default: all that are built.", show_default=False)] = None,
    folder: Out = None,
    as_json: Json = False,
) -> None:
    """Check built datasets against their manifests."""
    from meteora_core.data import catalog
    from meteora_core.errors import DataError

    _, data_dir = prepare(ctx, folder)
    reports = catalog.verify(data_dir, tasks)
    rows = [(report.task, "ok" if report.ok else "broken", "; ".join((*report.problems, *report.notes))) for report in reports]
    show_table([asdict(report) for report in reports], ("dataset", "state", "details"), rows, as_json)
    broken = [report.task for report in reports if not report.ok]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(reports)} datasets do not match their manifests: {', '.join(broken)}",
            hint="build them again with --force, or add your own datasets again from their files",
        )


def _state(built: bool, built_from: str | None) -> str:
    if not built:
        return "no"
    return built_from or "yes, without a manifest"
