"""The implementation of ``meteora train adapters``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from meteora_cli.commands.train_checks import adapter_tasks, check_adapter_targets, refuse_idle_flags
from meteora_cli.commands.train_launch import launch, launched_sizes
from meteora_cli.commands.train_stage import RunFlags, Stage, command_line, in_brackets, open_stage, say_next, scored_tasks, with_rows
from meteora_cli.console import emit_json, settings_from
from meteora_cli.display import put, say
from meteora_cli.flags import given_flags

if TYPE_CHECKING:
    from meteora_core.settings import AdapterTrainSettings, Settings
    from meteora_core.training.distributed import Runtime
    from meteora_core.training.single_adapter import TrainedAdapter


@dataclass(frozen=True)
class AdapterFlags:
    """Options for training on several tasks.

    Attributes:
        together: Whether all adapters are trained in one run.
        balanced: The name of one LoRA for all tasks; None means one LoRA per task.
    """

    together: bool
    balanced: str | None


@dataclass(frozen=True)
class _Adapters:
    """The datasets, and the settings of each adapter by its name."""

    tasks: list[str]
    settings: dict[str, AdapterTrainSettings]
    flags: AdapterFlags

    @property
    def members(self) -> list[str] | None:
        """The datasets of one LoRA for several tasks, else None."""
        return self.tasks if self.flags.balanced is not None else None


def train_all(ctx: typer.Context, flags: RunFlags, how: AdapterFlags) -> None:
    """Check everything that can be checked first, then train, launch or print the plan."""
    from meteora_core.data.userdata import register_all
    from meteora_core.training.distributed import start_runtime

    settings = settings_from(ctx)
    refuse_idle_flags(ctx, settings, gates=False, balanced=how.balanced is not None)
    register_all(settings)
    flags = with_rows(ctx, flags, settings, name_tasks=True)
    tasks = adapter_tasks(settings, flags.tasks, flags.source.max_rows)
    _check_combination(ctx, settings, how)
    runtime = start_runtime(settings.model.device)
    out = flags.out or settings.paths.adapters
    check_adapter_targets(settings, out, tasks, how.balanced)
    wanted = _Adapters(tasks, _task_settings(ctx, settings, tasks if how.balanced is None else [how.balanced]), how)
    if settings.launch.launcher != "none" and runtime.kind == "none":
        sizes = launched_sizes(settings, wanted.settings)
        raise typer.Exit(launch(ctx, settings, sizes, flags.out or settings.paths.runs, dry_run=flags.dry_run, as_json=flags.run.as_json))
    stage = open_stage(ctx, flags, settings, out, runtime)
    if flags.dry_run:
        _show_plan(stage, wanted)
        return
    stage.announce()
    done = _train(stage, wanted, runtime)
    if flags.run.as_json and runtime.is_main:
        emit_json([{**adapter.__dict__, "folder": str(adapter.folder)} for adapter in done])


def _check_combination(ctx: typer.Context, settings: Settings, how: AdapterFlags) -> None:
    from meteora_core.errors import UsageError

    if how.together and how.balanced is not None:
        raise UsageError("--together trains one adapter per task, --balanced one for all tasks", hint="choose one of the two")
    if "jobs" in given_flags(ctx) and (how.together or how.balanced is not None or settings.launch.launcher != "none"):
        raise UsageError(
            "--jobs trains each adapter in its own process, and cannot be combined with --launcher, --together or --balanced", hint="choose one of them"
        )


def _task_settings(ctx: typer.Context, settings: Settings, names: list[str]) -> dict[str, AdapterTrainSettings]:
    """Return the settings of each adapter. Given flags override the values for single tasks in the table of tasks and in the settings file."""
    from meteora_core.settings import AdapterTrainSettings
    from meteora_core.training.task_defaults import task_settings

    given = {name: ctx.params[name] for name in AdapterTrainSettings.model_fields if ctx.params.get(name) is not None}
    return {name: task_settings(settings.train_adapters, name, given) for name in names}


def _show_plan(stage: Stage, wanted: _Adapters) -> None:
    """Print, for every adapter, its settings and whether it is trained already."""
    from meteora_core.training.single_adapter import adapter_inputs, adapter_is_current
    from meteora_core.training.task_defaults import differing

    job, others, report = stage.job, differing(wanted.settings), list[dict[str, Any]]()
    for name, settings in wanted.settings.items():
        current = not job.force and adapter_is_current(job.out / name, adapter_inputs(job, stage.dtype, name, settings, wanted.members))
        report.append(
            {"task": name, "folder": str(job.out / name), "trained_already": current, "settings": settings.model_dump(mode="json"), "max_rows": job.max_rows}
        )
    if stage.flags.run.as_json:
        emit_json(report)
        return
    for entry in report:
        changed = others[entry["task"]] | ({} if job.max_rows is None else {"max_rows": job.max_rows})
        changes = ", ".join(f"{name} {value}" for name, value in changed.items())
        state = "trained already" if entry["trained_already"] else "to train"
        put(f"{entry['folder']}: {state}; {changes or 'all settings at their defaults'}")


def _train(stage: Stage, wanted: _Adapters, runtime: Runtime) -> list[TrainedAdapter]:
    from meteora_core.errors import UsageError
    from meteora_core.training.output_folders import check_targets
    from meteora_core.training.parallel_adapters import ParallelOutcome, job_devices, train_in_parallel
    from meteora_core.training.single_adapter import adapter_inputs, adapter_is_current

    how, job, settings = wanted.flags, stage.job, stage.settings
    if runtime.kind in ("fsdp", "deepspeed") and len(wanted.settings) > 1:
        raise UsageError(f"--launcher {runtime.kind} trains one adapter per run", hint="name one --task, or use --launcher ddp")
    inputs = {name: adapter_inputs(job, stage.dtype, name, each, wanted.members) for name, each in wanted.settings.items()}
    check_targets(job.out, [name for name in wanted.settings if job.force or not adapter_is_current(job.out / name, inputs[name])])
    several = settings.launch.jobs > 1 and len(wanted.settings) > 1 and runtime.kind == "none" and not how.together
    with stage.running() as job:
        if several:
            devices = job_devices(settings.model.device, min(settings.launch.jobs, len(wanted.settings)))
            outcome = train_in_parallel(wanted.settings, job, dtype=stage.dtype, devices=devices)
        else:
            outcome = ParallelOutcome(_train_here(stage, wanted, job))
    if stage.speaks:
        for adapter in outcome.done:
            say(_described(adapter, wanted.settings[adapter.task]))
        if outcome.done and not outcome.failed:
            say_next(stage.ctx, _next_commands(stage, wanted))
    outcome.check()
    return outcome.done


def _train_here(stage: Stage, wanted: _Adapters, job: Any) -> list[TrainedAdapter]:
    """Train in this process, either all adapters in one run or one after another."""
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.joint_adapters import train_together
    from meteora_core.training.single_adapter import train_adapter
    from meteora_core.training.task_defaults import task_settings

    model = load_base(job.base, dtype=stage.dtype, device=job.runtime.loading_device(stage.device), progress=job.progress)
    tokenizer = load_tokenizer(job.base, progress=job.progress)
    if wanted.flags.together:
        common = task_settings(stage.settings.train_adapters, "")
        return train_together(model, tokenizer, wanted.tasks, common, job, per_task=wanted.settings)
    return [train_adapter(model, tokenizer, name, settings, job, tasks=wanted.members) for name, settings in wanted.settings.items()]


def _described(adapter: TrainedAdapter, settings: AdapterTrainSettings) -> str:
    """Return one line about an adapter that was trained in this run or before."""
    loss = "an untrained LoRA, without a training step" if math.isnan(adapter.loss) else f"language-model loss {adapter.loss:.3f}"
    state = ["trained already"] if adapter.skipped else [f"{adapter.steps} steps", f"{adapter.seconds:.0f} s"] if adapter.steps else []
    state += [f"{adapter.cut} rows cut to {settings.max_length} tokens"] if adapter.cut else []
    return f"{adapter.folder}: {loss}{in_brackets(state)}"


def _next_commands(stage: Stage, wanted: _Adapters) -> list[tuple[str, str]]:
    """Return commands to run next: compare the adapters with the base model, and train the gates over all of them."""
    ctx, place = stage.ctx, [] if stage.flags.out is None and "adapters" not in given_flags(stage.ctx) else ["--adapters", str(stage.job.out)]
    commands, same = [], ("data", "base", "dtype", "device")
    if tasks := scored_tasks(stage.settings, wanted.tasks):
        words = ("eval", "--task", ",".join(tasks), "--model", f"base,{wanted.flags.balanced or 'own'}", "--limit", "50", *place)
        commands.append((command_line(ctx, *words, keep=same), "compare with the base model on 50 test rows of each task"))
    if wanted.flags.balanced is None:
        gates = command_line(ctx, "train", "gates", "--init", "ridge", *place, keep=same)
        commands.append((gates, f"train the gates over every adapter in {stage.job.out}"))
    return commands
