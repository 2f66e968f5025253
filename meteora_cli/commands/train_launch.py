"""The part of ``meteora train`` that starts several processes, each of which is ``meteora train`` again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from meteora_cli.console import emit_json, globals_of

if TYPE_CHECKING:
    from meteora_core.settings import AdapterTrainSettings, OptimSettings, Settings

LAUNCH_FLAGS = ("launcher", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "jobs", "dry_run", "rows")


def launch(ctx: typer.Context, settings: Settings, optim: OptimSettings, folder: Path, *, dry_run: bool, as_json: bool) -> int:
    """Start the processes, wait for them, return their exit code."""
    import os

    import torch

    from meteora_core.errors import MeteoraError
    from meteora_core.files import storage_errors
    from meteora_core.json_files import write_json
    from meteora_core.locks import scratch_folder
    from meteora_core.model.base import pick_dtype
    from meteora_core.training.accelerate_launch import launch_command, launch_config, process_count, run_command
    from meteora_core.training.deepspeed_zero import zero_config

    wish = settings.launch
    devices = 0 if settings.model.device == "cpu" else torch.cuda.device_count()
    count = process_count(wish, devices, planned=dry_run)
    planned = torch.bfloat16 if settings.model.dtype == "auto" and not devices else settings.model.dtype
    zero = zero_config(wish, optim, pick_dtype(planned, torch.device("cuda"))) if wish.launcher == "deepspeed" else None

    def written(place: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
        """The configuration files, and the command that reads them."""
        file, zero_file = place / "accelerate.json", (place / "deepspeed.json").resolve()
        if zero is None:
            files = {file: launch_config(wish, count)}
        else:
            files = {zero_file: zero, file: launch_config(wish, count, zero_file)}
        return files, launch_command(file, worker_arguments(ctx))

    if dry_run:
        files, command = written(folder.parent / ".launch")
        named = {"deepspeed_config": next(iter(files.values()))} if zero is not None else {}
        emit_json({"command": command, "config": list(files.values())[-1], **named} if as_json else command)
        return 0
    threads = None if devices else max(1, (os.cpu_count() or 1) * wish.num_machines // count)
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, "launch") as place:  # several launches may run at the same time
        files, command = written(place)
        for path, content in files.items():
            write_json(path, content)
        code = run_command(command, threads=threads)
    if 0 < code < 128:  # from 128 on, a signal ended it, usually Ctrl-C
        raise MeteoraError(
            f"the {count} processes of this training ended because one of them failed or was killed; see its error above (exit code {code} of the launcher)",
            hint="fix the cause, then run the same command with --resume to continue from the last saved state",
        )
    return code


def worker_arguments(ctx: typer.Context) -> list[str]:
    """The command line of this call, for a process that a launcher starts: the same flags without the launch flags."""
    given = globals_of(ctx)
    arguments = ["--config", str(given.config)] if given.config else []
    arguments += ["-v"] * given.verbose + (["-q"] if given.quiet else [])
    arguments += ["train", str(ctx.info_name)]
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name in LAUNCH_FLAGS or value is None or value == parameter.get_default(ctx):
            continue
        if isinstance(value, bool):
            arguments.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            arguments += [parameter.opts[0], str(value)]
    return [*arguments, "--launcher", "none"]


def launched_sizes(settings: Settings, each: dict[str, AdapterTrainSettings]) -> OptimSettings:
    """Batch size, accumulation and clipping of the launched run, which DeepSpeed wants to know beforehand: of the gates, or of the one adapter."""
    from meteora_core.errors import UsageError

    if settings.launch.launcher == "deepspeed" and len(each) > 1:
        raise UsageError("--launcher deepspeed trains one adapter a run", hint="name one --task, or use --launcher ddp")
    return next(iter(each.values()), settings.train_gates)
