"""The implementation of ``meteora train gates``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meteora_cli.commands.train_checks import gate_folders, refuse_idle_flags
from meteora_cli.commands.train_launch import launch
from meteora_cli.commands.train_stage import RunFlags, Stage, command_line, in_brackets, open_stage, say_next, scored_tasks, with_rows
from meteora_cli.console import emit_json, settings_from
from meteora_cli.display import DataTable, console, out, say

if TYPE_CHECKING:
    from meteora_core.settings import GateTrainSettings
    from meteora_core.training.gates import TrainedGates


def train_checkpoint(ctx: typer.Context, flags: RunFlags, *, any_base: bool, template: str | None = None) -> None:
    """Check everything that can be checked first, then train or launch."""
    from meteora_core.checkpoints.native import check_replaceable
    from meteora_core.data.userdata import register_all
    from meteora_core.errors import UsageError
    from meteora_core.training.distributed import start_runtime

    settings = settings_from(ctx)
    refuse_idle_flags(ctx, settings, gates=True, balanced=False)
    register_all(settings)
    flags = with_rows(ctx, flags, settings, name_tasks=False)
    folders, note = gate_folders(settings, flags.tasks, flags.source.max_rows, any_base=any_base)
    runtime = start_runtime(settings.model.device)
    if settings.launch.launcher != "none" and runtime.kind == "none":
        folder = flags.out or settings.paths.runs
        raise typer.Exit(launch(ctx, settings, settings.train_gates, folder, dry_run=flags.dry_run, as_json=flags.run.as_json))
    if flags.dry_run:
        raise UsageError("--dry-run shows the launch command, and there is no launcher", hint="add --launcher ddp or fsdp")
    stage = open_stage(ctx, flags, settings, flags.out or settings.paths.runs / "meteora", runtime)
    stage = replace(stage, job=replace(stage.job, template=template))
    check_replaceable(stage.job.out)
    stage.announce()
    if stage.speaks and note:
        say(f"note: {note}")
    done = _train(stage, folders)
    if not stage.speaks:
        return
    _report(done, settings.train_gates, on_stderr=flags.run.as_json)
    say_next(ctx, _next_commands(stage, done, list(folders)))
    if flags.run.as_json:
        emit_json({**done.__dict__, "folder": str(done.folder)})


def _train(stage: Stage, folders: dict[str, Path]) -> TrainedGates:
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.gates import train_gates

    settings = stage.settings
    with stage.running() as job:
        bank = AdapterBank.from_peft(folders, progress=job.progress)
        # the ridge start runs the whole model before the model is sharded
        device = stage.device if settings.train_gates.init == "ridge" else job.runtime.loading_device(stage.device)
        return train_gates(
            load_base(job.base, dtype=stage.dtype, device=device, progress=job.progress),
            load_tokenizer(job.base, progress=job.progress),
            bank,
            settings.train_gates,
            job,
            top_k=min(2, len(bank)) if settings.routing.top_k is None else settings.routing.top_k,
            routing_temperature=settings.routing.temperature or 1.0,
            backend=settings.model.backend,
        )


def described(done: TrainedGates, settings: GateTrainSettings) -> str:
    """Return one line about gates that were trained in this run or before: the parts of the loss, or the origin of gates without a training step."""
    if math.isnan(done.loss) and not done.steps:
        origins = {
            "ridge": f"gates in closed form (ridge) from about {settings.ridge_tokens:,} training tokens; no training step was made",
            "arrow": "gates computed from the adapters' weights (arrow); no training step was made",
        }
        what = origins.get(settings.init, f"untrained gates with their initial values ({settings.init}); no training step was made")
    elif {"lm", "gate"} <= done.parts.keys():
        what = f"loss {done.loss:.3f} = language model {done.parts['lm']:.3f} + {settings.beta:g} x gates {done.parts['gate']:.4f}"
        what += f", right adapter for {done.parts['accuracy']:.1%} of the tokens" if "accuracy" in done.parts else ""
    else:
        what = f"loss {done.loss:.3f}"
    state = ["trained already"] if done.skipped else [f"{done.steps} steps", f"{done.seconds:.0f} s"] if done.steps else []
    if done.memory and not done.skipped:
        state += [f"{done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s", f"at most {max(done.memory['peak']) / 2**30:.1f} GiB of a GPU"]
    state += [f"{done.cut} rows cut to {settings.max_length} tokens"] if done.cut else []
    return f"{done.folder}: {what}{in_brackets(state)}"


def _report(done: TrainedGates, settings: GateTrainSettings, *, on_stderr: bool) -> None:
    """Print the loss, the number of rows drawn from each task, and the held-out figures."""
    say(described(done, settings))
    screen = console if on_stderr else out
    if done.sampled and done.steps:
        table = DataTable("task", "train rows", "drawn", "passes", "tokens", "share")
        for name, seen in done.sampled.items():
            table.add_row(name, *(f"{seen[key]:,.0f}" for key in ("rows", "drawn")), f"{seen['passes']:.2f}", f"{seen['tokens']:,.0f}", f"{seen['share']:.1%}")
        screen.print(table)
    if done.held_out:
        table = DataTable("held-out train rows", "value")
        for name, value in done.held_out.items():
            table.add_row(name, f"{value:.1%}" if "accuracy" in name else f"{value:.3f}")
        screen.print(table)


def _next_commands(stage: Stage, done: TrainedGates, tasks: list[str]) -> list[tuple[str, str]]:
    """Return commands to run next; for gates with their initial values, only a command that trains them."""
    ctx, init = stage.ctx, stage.settings.train_gates.init
    if not done.steps and init in ("normal", "zeros") and len(tasks) > 1:
        again = command_line(ctx, "train", "gates", "--init", "ridge", keep=("task", "out_dir", "adapters", "data", "base", "dtype", "device"))
        return [(again, "train the gates: no command uses untrained gates")]
    checkpoint = ("--checkpoint", str(done.folder))
    commands = [(command_line(ctx, "chat", *checkpoint, keep=("device",)), "chat, and see which adapter answers")]
    if scored := scored_tasks(stage.settings, tasks):
        words = ("eval", "--task", ",".join(scored), "--model", "base,meteora", "--limit", "50", *checkpoint)
        commands.append((command_line(ctx, *words, keep=("data", "device", "dtype")), "compare with the base model on 50 test rows of each task"))
    trace = command_line(ctx, "trace", "--prompt", "Is the sky blue?", *checkpoint, keep=("device",))
    return [*commands, (trace, "draw which adapter was chosen for each token")]
