"""Starts the processes of ``meteora train --launcher``, each of which runs ``meteora train`` again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from meteora_cli.console import emit_json, globals_of

if TYPE_CHECKING:
    from meteora_core.settings import AdapterTrainSettings, OptimSettings, Settings

LAUNCH_FLAGS = ("launcher", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "jobs", "dry_run", "rows")


def launch(ctx: typer.Context, settings: Settings, optim: OptimSettings, folder: Path, *, dry_run: bool, as_json: bool) -> int:
    """Start the processes, wait for them, and return their exit code."""
    import os

    import torch

    from meteora_core.errors import MeteoraError
    from meteora_core.files import storage_errors
    from meteora_core.json_files import write_json
    from meteora_core.locks import scratch_folder
    from meteora_core.model.base import pick_dtype
    from meteora_core.training.accelerate_launch import launch_command, launch_config, process_count, run_command
    from meteora_core.training.deepspeed_zero import zero_config

    launch_settings = settings.launch
    devices = 0 if settings.model.device == "cpu" else torch.cuda.device_count()
    count = process_count(launch_settings, devices, planned=dry_run)
    planned = torch.bfloat16 if settings.model.dtype == "auto" and not devices else settings.model.dtype
    zero = zero_config(launch_settings, optim, pick_dtype(planned, torch.device("cuda"))) if launch_settings.launcher == "deepspeed" else None

    def written(location: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
        """Return the configuration files, and the command that reads them."""
        file, zero_file = location / "accelerate.json", (location / "deepspeed.json").resolve()
        if zero is None:
            files = {file: launch_config(launch_settings, count)}
        else:
            files = {zero_file: zero, file: launch_config(launch_settings, count, zero_file)}
        return files, launch_command(file, worker_arguments(ctx))

    if dry_run:
        files, command = written(folder.parent / ".launch")
        named = {"deepspeed_config": next(iter(files.values()))} if zero is not None else {}
        emit_json({"command": command, "config": list(files.values())[-1], **named} if as_json else command)
        return 0
    threads = None if devices else max(1, (os.cpu_count() or 1) * launch_settings.num_machines // count)
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, "launch") as scratch:  # a separate folder, because several launches may run at the same time
        files, command = written(scratch)
        for path, content in files.items():
            write_json(path, content)
        code = run_command(command, threads=threads)
    if 0 < code < 128:  # codes from 128 mean that a signal, usually Ctrl-C, ended the launcher
        raise MeteoraError(
            f"the {count} processes of this training ended because one of them failed or was killed; see its error above (exit code {code} of the launcher)",
            hint="fix the cause, then run the same command with --resume to continue from the last saved state",
        )
    return code


def worker_arguments(ctx: typer.Context) -> list[str]:
    """Return the command line for a process that the launcher starts: the flags of this call without the launch flags."""
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
    """Return the settings of the gates or of the single adapter, whose batch size, accumulation and clipping DeepSpeed needs at the start."""
    from meteora_core.errors import UsageError

    if settings.launch.launcher == "deepspeed" and len(each) > 1:
        raise UsageError("--launcher deepspeed trains one adapter per run", hint="name one --task, or use --launcher ddp")
    return next(iter(each.values()), settings.train_gates)
