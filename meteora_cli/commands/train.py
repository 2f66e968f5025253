"""``meteora train``: adapters, one per task, or the gates over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands.train_checks import adapter_tasks, check_adapter_targets, gate_folders, refuse_idle_flags
from meteora_cli.commands.train_launch import launch, launched_sizes
from meteora_cli.console import emit_json, progress, settings_from
from meteora_cli.display import DataTable, console, out, put, say
from meteora_cli.flags import refuse_panels

if TYPE_CHECKING:
    import torch

    from meteora_core.settings import AdapterTrainSettings, Settings
    from meteora_core.training.job import TrainJob


class Stage(StrEnum):
    """What to train."""

    adapters = "adapters"
    gates = "gates"


class Trainable(StrEnum):
    """What trains in the gates' stage."""

    gates = "gates"
    both = "gates+adapters"


class Init(StrEnum):
    """How gates start."""

    normal = "normal"
    zeros = "zeros"
    arrow = "arrow"
    ridge = "ridge"


class Launcher(StrEnum):
    """How training is spread over devices."""

    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed = "deepspeed"


class Sampling(StrEnum):
    """How rows are drawn from the tasks."""

    balanced = "balanced"
    proportional = "proportional"


class LossOn(StrEnum):
    """Which tokens the language-model loss counts."""

    all = "all"
    response = "response"


class LogTo(StrEnum):
    """Where curves go."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


GATES = "Only with --stage gates"
ADAPTERS = "Only with --stage adapters"
LAUNCH = "Several processes"


def train(
    ctx: typer.Context,
    stage: Annotated[Stage, typer.Option(help="adapters: one LoRA per task; gates: the gates over all adapters.")] = Stage.gates,
    task: Annotated[str | None, typer.Option(help="Task names, separated by commas; gates: default is every adapter folder.", show_default=False)] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="gates: the checkpoint's folder (default: runs/meteora); adapters: their parent.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Datasets.", show_default=False)] = None,
    adapters: Annotated[Path | None, typer.Option(help="Adapter folders.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a catalog name, a folder or a hub id.", show_default=False)] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Take adapters even if they name different base models.", rich_help_panel=GATES)] = False,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward pass.", show_default=False)] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes in one step.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row, in tokens.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.", show_default=False)] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time.", show_default=False)
    ] = None,
    packing: Annotated[bool | None, typer.Option("--packing/--no-packing", help="Several rows in each sequence of --max-length.", show_default=False)] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between held-out evaluations; the best weights are kept.", show_default=False)] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after this many evaluations without an improvement.", show_default=False)] = None,
    log_steps: Annotated[int | None, typer.Option(help="Steps between log lines.", show_default=False)] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between resumable states.", show_default=False)] = None,
    log_to: Annotated[LogTo | None, typer.Option(help="Where curves go.", show_default=False)] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first N train rows of each task.", show_default=False)] = None,
    loss_on: Annotated[LossOn | None, typer.Option(help="Tokens that the language-model loss counts.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(rich_help_panel=ADAPTERS, help="LoRA rank.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(rich_help_panel=ADAPTERS, help="LoRA alpha.", show_default=False)] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=ADAPTERS, help="Adapters trained at once, each in its own process (and on its own GPU).", show_default=False),
    ] = None,
    together: Annotated[bool, typer.Option("--together", rich_help_panel=ADAPTERS, help="All tasks in one run, each row by its own adapter.")] = False,
    balanced: Annotated[bool, typer.Option("--balanced", rich_help_panel=ADAPTERS, help="One LoRA over all the tasks, mixed evenly.")] = False,
    name: Annotated[str, typer.Option(rich_help_panel=ADAPTERS, help="The name of the --balanced LoRA.")] = "balanced",
    beta: Annotated[float | None, typer.Option(rich_help_panel=GATES, help="Weight of the gate loss.", show_default=False)] = None,
    answer_share: Annotated[
        float | None, typer.Option(rich_help_panel=GATES, help="Share of the gate loss that answers have together.", show_default=False)
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", rich_help_panel=GATES, help="Adapters per token.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option("--T", rich_help_panel=GATES, help="Routing temperature.", show_default=False)] = None,
    trainable: Annotated[Trainable | None, typer.Option(rich_help_panel=GATES, help="What trains.", show_default=False)] = None,
    adapter_lr: Annotated[
        float | None, typer.Option(rich_help_panel=GATES, help="Peak learning rate of adapters that train along.", show_default=False)
    ] = None,
    init: Annotated[Init | None, typer.Option(rich_help_panel=GATES, help="How they start.", show_default=False)] = None,
    composite_rows: Annotated[
        float | None, typer.Option(rich_help_panel=GATES, help="Share of the rows that are composites of tasks.", show_default=False)
    ] = None,
    composite_max: Annotated[int | None, typer.Option(rich_help_panel=GATES, help="Most tasks in a composite row.", show_default=False)] = None,
    sampling: Annotated[
        Sampling | None, typer.Option(rich_help_panel=GATES, help="As many tokens of every task, or every row as often.", show_default=False)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …", show_default=False)] = None,
    backend: Annotated[str | None, typer.Option(rich_help_panel=GATES, help="Mixture kernels.", show_default=False)] = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(
            rich_help_panel=LAUNCH, help="ddp: one copy of the model on each device; fsdp: the model is sharded; deepspeed: ZeRO.", show_default=False
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(rich_help_panel=LAUNCH, help="Processes over all machines; default: one a GPU.", show_default=False)
    ] = None,
    num_machines: Annotated[int | None, typer.Option(rich_help_panel=LAUNCH, help="Machines.", show_default=False)] = None,
    machine_rank: Annotated[int | None, typer.Option(rich_help_panel=LAUNCH, help="Which machine this is, from 0.", show_default=False)] = None,
    main_process_ip: Annotated[str | None, typer.Option(rich_help_panel=LAUNCH, help="Address of machine 0.", show_default=False)] = None,
    main_process_port: Annotated[int | None, typer.Option(rich_help_panel=LAUNCH, help="Port on machine 0.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the launch command, or each adapter's settings, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state of the same run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if the same result is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train one LoRA per task (--stage adapters), or the gates over all adapters (the default).

    Adapters and datasets are matched by name: adapters/gsm8k learns from, and its gate is labelled by, datasets/gsm8k.
    """
    if stage is Stage.adapters:
        refuse_panels(ctx, [GATES], "--stage gates", hint="leave that out, or train the gates (leave out --stage adapters)")
    else:
        refuse_panels(ctx, [ADAPTERS], "--stage adapters", hint="add --stage adapters, or leave that out")
    section = "train_adapters" if stage is Stage.adapters else "train_gates"
    shared: dict[str, Any] = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "learning_rate": lr,
        "max_length": max_length,
        "seed": seed,
        "gradient_checkpointing": gradient_checkpointing,
    }
    shared |= {"packing": packing, "eval_steps": eval_steps, "patience": patience, "log_steps": log_steps, "save_steps": save_steps}
    shared |= {"log_to": log_to and log_to.value, "loss_on": loss_on and loss_on.value}
    own: dict[str, Any] = {"rank": rank, "alpha": alpha}
    if stage is Stage.gates:
        own = {
            "beta": beta,
            "answer_share": answer_share,
            "adapter_learning_rate": adapter_lr,
            "trainable": trainable and trainable.value,
            "init": init and init.value,
        }
        own |= {"composite_rows": composite_rows, "composite_max": composite_max, "sampling": sampling and sampling.value}
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
        launch__launcher=launcher and launcher.value,
        launch__num_processes=num_processes,
        launch__num_machines=num_machines,
        launch__machine_rank=machine_rank,
        launch__main_process_ip=main_process_ip,
        launch__main_process_port=main_process_port,
        launch__jobs=jobs,
        **{f"{section}__{name}": value for name, value in {**shared, **own}.items()},
    )
    from meteora_core.data.userdata import register_all
    from meteora_core.errors import MeteoraError, UsageError
    from meteora_core.files import cache_dir
    from meteora_core.model.base import BaseReference, pick_device, pick_dtype
    from meteora_core.training.distributed import start_runtime
    from meteora_core.training.job import TrainJob

    refuse_idle_flags(ctx, settings, gates=stage is Stage.gates, balanced=balanced)
    register_all(settings)
    names = [name.strip() for name in (task or "").split(",") if name.strip()]
    folders = gate_folders(settings, names, max_rows, any_base=any_base) if stage is Stage.gates else {}
    if stage is Stage.adapters:
        names = adapter_tasks(settings, names, max_rows)
    if together and balanced:
        raise UsageError("--together trains one adapter per task, --balanced one for all tasks", hint="choose one of the two")
    if jobs and (together or balanced or settings.launch.launcher != "none"):
        raise UsageError(
            "--jobs trains each adapter in its own process, and cannot be combined with --launcher, --together or --balanced", hint="choose one of them"
        )
    runtime = start_runtime(settings.model.device)
    each: dict[str, AdapterTrainSettings] = {}
    if stage is Stage.adapters:
        check_adapter_targets(settings, out_dir, names, name if balanced else None)
        given = {name: value for name, value in {**shared, **own}.items() if value is not None}
        each = _task_settings(settings, [name] if balanced else names, given)
    if settings.launch.launcher != "none" and runtime.kind == "none":
        sizes = launched_sizes(settings, each)
        raise typer.Exit(launch(ctx, settings, sizes, out_dir or settings.paths.runs, dry_run=dry_run, as_json=as_json))
    if dry_run and stage is Stage.gates:
        raise UsageError("--dry-run shows the launch command, and there is no launcher", hint="add --launcher ddp or fsdp")
    reference = BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code)
    place = runtime.device or pick_device(settings.model.device)
    kind = pick_dtype(settings.model.dtype, place)
    if runtime.is_main and not dry_run:
        spread = f", {runtime.world} processes ({runtime.kind})" if runtime.kind != "none" else ""
        say(f"{settings.model.base} in {str(kind).removeprefix('torch.')} on {place}{spread}")
    folder = out_dir or (settings.paths.runs / "meteora" if stage is Stage.gates else settings.paths.adapters)
    job = TrainJob(reference, settings.paths.data, folder, max_rows, cache_dir() / "tokens", resume, force, runtime)
    run = _Stage(ctx, settings, job, place, kind, as_json)
    if dry_run:
        _show_plan(run, names, each, balanced=name if balanced else None)
        return
    try:
        if stage is Stage.gates:
            report: Any = _gates(run, folders)
        else:
            report = _adapters(run, names, each, together=together, balanced=name if balanced else None)
    except MeteoraError as error:
        if not runtime.is_main:
            error.message = f"process {runtime.rank}: {error.message}"
        raise
    if as_json and runtime.is_main:
        emit_json(report)


@dataclass(frozen=True)
class _Stage:
    """What both stages need.

    Attributes:
        ctx: The context of the command.
        settings: The settings in force.
        job: Base model, folders, processes.
        device: The device of the base model.
        dtype: Its number type.
        as_json: Whether the report is one JSON document.
    """

    ctx: typer.Context
    settings: Settings
    job: TrainJob
    device: torch.device
    dtype: torch.dtype
    as_json: bool

    @contextmanager
    def running(self) -> Iterator[TrainJob]:
        """The job with progress bars in the main process, and none in the others."""
        from meteora_core.progress import SILENT

        with progress(self.ctx) if self.job.runtime.is_main else nullcontext(SILENT) as bars:
            yield replace(self.job, progress=bars)


def _task_settings(settings: Settings, names: list[str], given: dict[str, Any]) -> dict[str, AdapterTrainSettings]:
    """How each adapter is trained; the flags that were given win over what the table and the file say of single tasks."""
    from meteora_core.training.task_defaults import task_settings

    return {name: task_settings(settings.train_adapters, name, given) for name in names}


def _show_plan(run: _Stage, names: list[str], each: dict[str, AdapterTrainSettings], *, balanced: str | None) -> None:
    """Print, for every adapter, what it would be trained with, and whether it is there already."""
    from meteora_core.training.single_adapter import adapter_inputs, adapter_is_current
    from meteora_core.training.task_defaults import differing

    out_dir = run.job.out
    others, report = differing(each), list[dict[str, Any]]()
    for name, settings in each.items():
        inputs = adapter_inputs(run.job, run.dtype, name, settings, names if balanced else None)
        there = not run.job.force and adapter_is_current(out_dir / name, inputs)
        report.append(
            {"task": name, "folder": str(out_dir / name), "trained_already": there, "settings": settings.model_dump(mode="json"), "max_rows": run.job.max_rows}
        )
    if run.as_json:
        emit_json(report)
        return
    for entry in report:
        changed = others[entry["task"]] | ({} if run.job.max_rows is None else {"max_rows": run.job.max_rows})
        changes = ", ".join(f"{name} {value}" for name, value in changed.items())
        state = "is there already" if entry["trained_already"] else "to train"
        put(f"{entry['folder']}: {state}; {changes or 'all settings at their defaults'}")


def _loss(value: float) -> str:
    return "no training step was made" if math.isnan(value) else f"loss {value:.3f}"


def _adapters(run: _Stage, names: list[str], each: dict[str, AdapterTrainSettings], *, together: bool, balanced: str | None) -> list[dict[str, Any]]:
    from meteora_core.errors import UsageError
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.joint_adapters import train_together
    from meteora_core.training.output_folders import check_targets
    from meteora_core.training.parallel_adapters import job_devices, train_in_parallel
    from meteora_core.training.single_adapter import adapter_inputs, adapter_is_current, train_adapter

    job, settings = run.job, run.settings
    if job.runtime.kind in ("fsdp", "deepspeed") and len(names) > 1 and balanced is None:
        raise UsageError(f"--launcher {job.runtime.kind} trains one adapter a run", hint="name one --task, or use --launcher ddp")
    members = names if balanced is not None else None
    current = {name for name, each_own in each.items() if adapter_is_current(job.out / name, adapter_inputs(job, run.dtype, name, each_own, members))}
    check_targets(job.out, [name for name in each if job.force or name not in current])
    jobs, outcome = settings.launch.jobs, None
    with run.running() as job:
        if jobs > 1 and len(names) > 1 and job.runtime.kind == "none" and not together and balanced is None:
            outcome = train_in_parallel(each, job, dtype=run.dtype, devices=job_devices(settings.model.device, min(jobs, len(names))))
            done = outcome.done
        else:
            model = load_base(job.base, dtype=run.dtype, device=job.runtime.loading_device(run.device), progress=job.progress)
            tokenizer = load_tokenizer(job.base, progress=job.progress)
            if together:
                common = _task_settings(settings, [""], {})[""]
                done = train_together(model, tokenizer, names, common, job, per_task=each)
            else:
                done = [train_adapter(model, tokenizer, name, own, job, tasks=members) for name, own in each.items()]
    for adapter in done if job.runtime.is_main else []:
        state = "was there already" if adapter.skipped else f"{adapter.steps} steps, {adapter.seconds:.0f} s"
        note = f", {adapter.cut} rows cut to {each[adapter.task].max_length} tokens" if adapter.cut else ""
        say(f"{adapter.folder}: {_loss(adapter.loss)} ({state}{note})")
    if outcome is not None:
        outcome.check()
    return [{**adapter.__dict__, "folder": str(adapter.folder)} for adapter in done]


def _gates(run: _Stage, folders: dict[str, Path]) -> dict[str, Any]:
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.adapters.folders import check_bases
    from meteora_core.checkpoints.native import check_replaceable
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.gates import train_gates

    settings, job = run.settings, run.job
    check_replaceable(job.out)
    if job.runtime.is_main and (note := check_bases(folders, settings.model.base, any_base=True)):
        say(f"note: {note}")
    with run.running() as job:
        bank = AdapterBank.from_peft(folders, progress=job.progress)
        device = run.device if settings.train_gates.init == "ridge" else job.runtime.loading_device(run.device)  # ridge runs the whole model first
        model = load_base(job.base, dtype=run.dtype, device=device, progress=job.progress)
        done = train_gates(
            model,
            load_tokenizer(job.base, progress=job.progress),
            bank,
            settings.train_gates,
            job,
            top_k=min(2, len(bank)) if settings.routing.top_k is None else settings.routing.top_k,
            temperature=settings.routing.temperature or 1.0,
            backend=settings.model.backend,
        )
    report = {**done.__dict__, "folder": str(done.folder)}
    if not job.runtime.is_main:
        return report
    state = "was there already" if done.skipped else f"{done.steps} steps, {done.seconds:.0f} s"
    if done.memory and not done.skipped:
        state += f", {done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s, at most {max(done.memory['peak']) / 2**30:.1f} GiB of a GPU"
    note = f", {done.cut} rows cut to {settings.train_gates.max_length} tokens" if done.cut else ""
    say(f"{done.folder}: {_loss(done.loss)} ({state}{note})")
    if done.sampled and done.steps:
        table = DataTable("task", "train rows", "drawn", "passes", "tokens", "share")
        for name, seen in done.sampled.items():
            table.add_row(name, *(f"{seen[key]:,.0f}" for key in ("rows", "drawn")), f"{seen['passes']:.2f}", f"{seen['tokens']:,.0f}", f"{seen['share']:.1%}")
        (console if run.as_json else out).print(table)
    if done.held_out:
        table = DataTable("held-out train rows", "value")
        for name, value in done.held_out.items():
            table.add_row(name, f"{value:.1%}" if "accuracy" in name else f"{value:.3f}")
        (console if run.as_json else out).print(table)
    return report
