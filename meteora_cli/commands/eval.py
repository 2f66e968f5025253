"""``meteora eval``: generates and scores answers to test rows. ``meteora eval report``: compares several results."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands.shared_options import Checkpoint, In4Bit, In8Bit, TopK
from meteora_cli.console import emit_json, quantization_of, settings_from, write_text
from meteora_cli.display import console, out, say
from meteora_cli.flags import comma_separated, given_flags, refuse_without_effect, typed_template
from meteora_cli.typer_app import App
from meteora_core.choices import EvalLauncher, ReportKind, Scoring

if TYPE_CHECKING:
    import torch

app = App()


@app.callback(invoke_without_command=True)
def evaluate(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "--tasks", help="Names of tasks, separated by commas; or singles, composites or all, of the built datasets. Required.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Models, separated by commas: meteora, base, own (each task's own adapter), peft-arrow, router:NAME (oracle, meteora, closed-form, arrow,"
            " spectr, phatgoose, centroid, uniform or random; router:all for these nine), an adapter's name or folder, or all."
        ),
    ] = "meteora",
    without_asked: Annotated[
        bool, typer.Option("--without-asked", help="Remove the asked task's adapter from all routers but the oracle (requires a router).")
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="Seeds, separated by commas: each router that depends on a seed is evaluated once per seed.", show_default=False),
    ] = None,
    checkpoint: Checkpoint = None,
    routing_temperature: Annotated[
        float | None, typer.Option("--T", help="Routing temperature T; default: the task's (1; composites 15 to 30).", show_default=False)
    ] = None,
    top_k: TopK = None,
    batch_size: Annotated[str | None, typer.Option(help="Number of prompts in one batch, or auto.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens; default: the task's.", show_default=False)] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt in tokens; longer ones are skipped; default: the model's context, or 4096 with the answer for paper scoring.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of test rows to evaluate, starting at the first.", show_default=False)] = None,
    template: Annotated[
        str | None,
        typer.Option(
            callback=typed_template, help="Prompt template: auto (as in chat), chat, inst, raw or a text with {}; default: the dataset's.", show_default=False
        ),
    ] = None,
    scoring: Annotated[
        Scoring | None, typer.Option(help="corrected: by the definitions of the metrics; paper: as the authors computed them.", show_default=False)
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write results and samples under runs/eval, where an interrupted run resumes.")] = True,
    out_dir: Annotated[
        Path | None, typer.Option("--out", "--output-dir", help="Folder of the results, with one sub-folder per model; default: runs/eval.", show_default=False)
    ] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Count the chosen adapters, for a table, JSON and a heat map.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show prompt, answer and reference of 10 rows.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of datasets.", show_default=False)] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters; for the authors' layout, it also gives the adapters' names and alphas.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a known name, a folder or a hub id.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the base model: auto, float32, bfloat16 or float16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda, cuda:1 or mps.", show_default=False)] = None,
    backend: Annotated[str | None, typer.Option(help="Implementation of the sum over adapters: auto, reference, dense or triton.", show_default=False)] = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    launcher: Annotated[EvalLauncher, typer.Option(help="ddp: divide the rows between processes, as `accelerate launch -m meteora_cli eval …` does.")] = "none",
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="With --launcher ddp: number of processes; default: one per GPU.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document, which is a list for several models.")] = False,
) -> None:
    """Generate greedy answers to test rows and score them."""
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    from meteora_core.errors import UsageError

    names = comma_separated(task)
    if not names:
        raise UsageError("no task given", hint="meteora eval --task NAME[,NAME] | singles | composites | all; `meteora data list` shows them")
    settings = settings_from(ctx, model__quantization=quantization_of(load_in_4bit, load_in_8bit))
    models = _models(ctx, model, seeds, without_asked=without_asked)
    _refuse_without_effect(ctx, models, launcher, save=save)
    from meteora_core.data.userdata import register_all
    from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan, choose_tasks
    from meteora_core.evaluation.evaluate import evaluate as run
    from meteora_core.evaluation.evaluate import prepare
    from meteora_core.evaluation.processes import join_processes, leave_processes
    from meteora_core.model.base import BaseReference, pick_device, pick_dtype
    from meteora_core.routers import make_router
    from meteora_core.settings import ModelSettings
    from meteora_core.starter import usual_checkpoint

    register_all(settings)
    place = pick_device(settings.model.device)
    kind = pick_dtype(settings.model.dtype, place)
    tasks = choose_tasks(names, settings.paths.data)
    plan = EvalPlan(
        tasks=tasks,
        models=models,
        data_dir=settings.paths.data,
        other_data=(settings.paths.runs / "starter" / "datasets", settings.paths.runs / "quickstart" / "datasets"),
        adapters_dir=settings.paths.adapters,
        checkpoint=checkpoint or usual_checkpoint(settings.paths.runs),
        base=BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code),
        base_given=base is not None or settings.model.base != ModelSettings().base,
        checkpoint_adapters=adapters,
        backend=settings.model.backend,
        quantization=None if settings.model.quantization == "none" else settings.model.quantization,
        out_dir=settings.paths.runs / "eval" if save else None,
        options=EvalOptions.of(settings.eval, settings.routing, count_routes=routing),
        make_router=make_router,
    )
    if out_dir is not None and save:
        plan = replace(plan, out_dir=out_dir)
    if launcher == "ddp" and "WORLD_SIZE" not in os.environ:
        prepare(plan, place, kind)
        _launch(processes, place)
        return
    import torch

    group = join_processes()
    if group.rank:
        console.quiet = out.quiet = True
    if group.count > 1 and place.type == "cuda" and place.index is None:
        place = pick_device(f"cuda:{group.local_rank}")
        torch.cuda.set_device(place)
    from meteora_cli.commands.eval_live import eval_progress
    from meteora_cli.commands.eval_tables import results_table, routing_table, samples_table, shares_table, speed_line, warnings_of
    from meteora_core.errors import DataError
    from meteora_core.evaluation.oracle_shares import ORACLE, oracle_shares

    try:
        with eval_progress(ctx, models, tasks) as (bars, on_result):
            outcomes = run(plan, device=place, dtype=kind, on_result=on_result, progress=bars, processes=group)
    finally:
        leave_processes()
    if group.rank:
        return
    if debug:
        for outcome in outcomes:
            for result in outcome.results.values():
                console.print(samples_table(outcome.model, result))
    if as_json:
        documents = [outcome.document for outcome in outcomes]
        emit_json(documents[0] if len(documents) == 1 else documents)
    else:
        out.print(results_table(outcomes))
        if len(outcomes) > 1 and any(outcome.model == ORACLE for outcome in outcomes):
            try:
                out.print(shares_table(oracle_shares([outcome.document for outcome in outcomes]), ORACLE))
            except DataError as error:
                say(error.message)
        for table in filter(None, map(routing_table, outcomes)):
            out.print(table)
        for line in (*warnings_of(outcomes), speed_line(outcomes)):
            if line is not None:
                say(line)
    for outcome in outcomes:
        if outcome.file is not None:
            say(f"saved {outcome.file}")
        if outcome.picture is not None:
            say(f"saved {outcome.picture}")


@app.command("report")
def report(
    ctx: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Results files, folders of results files (the newest is used), or a folder of such folders.", show_default=False),
    ],
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Name of a column, once for each RUN; default: the models' names.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="File for a chart of the results: .png, .svg or .pdf.", show_default=False)] = None,
    kind: Annotated[ReportKind, typer.Option(help="Kind of chart; radar needs at least three tasks.")] = "bar",
    relative_to: Annotated[
        str | None,
        typer.Option(
            "--relative-to",
            help="Show the mean score of each model as a share of this model's, usually router:oracle, with 95 % intervals; runs of one model are averaged.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Compare the results of several runs side by side."""
    from meteora_core.errors import UsageError
    from meteora_core.evaluation.report import as_document, compare, find_results, load_results, plot, to_markdown

    if markdown and as_json:
        raise UsageError("--markdown and --json exclude each other", hint="choose one of them")
    refuse_without_effect(ctx, {"kind": (picture is not None and relative_to is None, "--plot and without --relative-to")})
    files = find_results(runs)
    if relative_to is not None:
        refuse_without_effect(ctx, {"label": (False, "a report without --relative-to")})
        _report_shares([load_results(file) for file in files], relative_to, picture, "markdown" if markdown else "json" if as_json else "table")
        return
    comparison = compare([load_results(file) for file in files], label or None)
    if picture is not None:
        plot(comparison, picture, kind)
        say(f"saved {picture}")
    if as_json:
        emit_json(as_document(comparison, files))
    elif markdown:
        write_text(to_markdown(comparison))
    else:
        from meteora_cli.commands.eval_tables import comparison_table

        out.print(comparison_table(comparison))


def _report_shares(documents: Sequence[Mapping[str, Any]], oracle: str, picture: Path | None, form: str) -> None:
    """Print the scores of several runs relative to one model's, as a table, Markdown or JSON, and draw them."""
    from meteora_core.evaluation.oracle_shares import oracle_shares, plot_shares, shares_document, shares_markdown

    shares = oracle_shares(documents, oracle)
    if picture is not None:
        say(f"saved {plot_shares(shares, oracle, picture)}")
    if form == "json":
        emit_json(shares_document(shares, oracle))
    elif form == "markdown":
        write_text(shares_markdown(shares, oracle))
    else:
        from meteora_cli.commands.eval_tables import shares_table

        out.print(shares_table(shares, oracle))


def _refuse_options(ctx: typer.Context) -> None:
    """Refuse options before the word report, which would have no effect. Raises UsageError."""
    from meteora_core.errors import UsageError

    for flag in given_flags(ctx).values():
        raise UsageError(f"{flag} belongs to `meteora eval`, not to `meteora eval report`", hint="write the options of report after the word report")


def _models(ctx: typer.Context, text: str, seeds: str | None, *, without_asked: bool) -> tuple[str, ...]:
    """The names of the models, with ``all`` and ``router:all`` expanded, and each router once per seed. Raises UsageError."""
    from meteora_core.errors import UsageError
    from meteora_core.evaluation.router_names import PREFIX, ROUTERS, SEEDED, expand_routers, router_name

    names: list[str] = []
    for name in ("base", "own", "meteora") if text == "all" else comma_separated(text):
        names += [PREFIX + router for router in ROUTERS] if name == f"{PREFIX}all" else [name]
    routers = {router.name for router in map(router_name, names) if router is not None}
    refuse_without_effect(
        ctx,
        {
            "without_asked": (bool(routers - {"oracle"}), "a router in --model, such as router:arrow"),
            "seeds": (bool(routers & SEEDED), "a router in --model that depends on a seed, such as router:random"),
        },
    )
    numbers = comma_separated(seeds)
    if not all(number.isdecimal() and len(number) < 10 for number in numbers):
        raise UsageError(f"{seeds!r} is not a list of seeds", hint="for example --seeds 1,2")
    return expand_routers(names, without_asked=without_asked, seeds=tuple(map(int, numbers)))


def _refuse_without_effect(ctx: typer.Context, models: Sequence[str], launcher: EvalLauncher, *, save: bool) -> None:
    """Refuse flags that have no effect for the given models, or without another flag."""
    from meteora_core.evaluation.arrow import ARROW
    from meteora_core.evaluation.router_names import CHOOSES_TOP_K, is_meteora, router_name

    names = [router.name for router in map(router_name, models) if router is not None]
    checkpoints = any(map(is_meteora, models))
    routed = checkpoints or ARROW in models or bool(CHOOSES_TOP_K.intersection(names))
    refuse_without_effect(
        ctx,
        {
            "checkpoint": (checkpoints, "--model meteora"),
            "backend": (checkpoints or "closed-form" in names, "--model meteora"),
            "routing_temperature": (routed, "--model meteora, peft-arrow or a router that mixes adapters"),
            "top_k": (routed, "--model meteora, peft-arrow or a router that mixes adapters"),
            "adapters": (tuple(models) != ("base",), "a --model with adapters"),
            "out_dir": (save, "--save"),
            "processes": (launcher == "ddp", "--launcher ddp"),
        },
    )


def _launch(processes: int | None, place: torch.device) -> None:
    """Run this command in several processes, and exit with their exit code if one fails."""
    import torch

    from meteora_core.errors import UsageError
    from meteora_core.evaluation.processes import launch

    if processes is None and place.type != "cuda":
        raise UsageError(
            "--launcher ddp needs a number of processes on this device", hint="use --launcher ddp --processes N; on GPUs, the default is one per GPU"
        )
    code = launch([sys.executable, "-m", "meteora_cli", *sys.argv[1:]], processes or torch.cuda.device_count())
    if code:
        raise typer.Exit(code)
