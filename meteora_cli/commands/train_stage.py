"""Shared parts of the commands of ``meteora train``: flags that are not settings, the job, and the suggestions at the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meteora_cli.console import globals_of, progress
from meteora_cli.display import say
from meteora_cli.flags import given_flags

if TYPE_CHECKING:
    import torch

    from meteora_cli.commands.train_options import RowOptions, ThisRun
    from meteora_core.settings import Settings
    from meteora_core.training.distributed import Runtime
    from meteora_core.training.job import TrainJob


@dataclass(frozen=True)
class RunFlags:
    """The options of both commands that are not settings.

    Attributes:
        tasks: The names in --task; empty if the flag was not given.
        out: The folder in --out; None if the flag was not given.
        dry_run: Whether to print what would be done, and exit.
        source: The rows to train on.
        run: What happens to saved states, an existing result and the report.
    """

    tasks: list[str]
    out: Path | None
    dry_run: bool
    source: RowOptions
    run: ThisRun


@dataclass(frozen=True)
class Stage:
    """A training run that is ready to start.

    Attributes:
        ctx: The context of the command.
        flags: The options that are not settings.
        settings: The settings in effect.
        job: The base model, the folders and the processes of the run.
        device: The device of the base model.
        dtype: The dtype of the base model.
    """

    ctx: typer.Context
    flags: RunFlags
    settings: Settings
    job: TrainJob
    device: torch.device
    dtype: torch.dtype

    @contextmanager
    def running(self) -> Iterator[TrainJob]:
        """Yield the job, with progress bars in the main process. Errors in other processes name the process."""
        from meteora_core.errors import MeteoraError
        from meteora_core.progress import SILENT

        runtime = self.job.runtime
        try:
            with progress(self.ctx) if runtime.is_main else nullcontext(SILENT) as bars:
                yield replace(self.job, progress=bars)
        except MeteoraError as error:
            if not runtime.is_main:
                error.message = f"process {runtime.rank}: {error.message}"
            raise

    @property
    def speaks(self) -> bool:
        """Whether this process prints the results."""
        return self.job.runtime.is_main

    def announce(self) -> None:
        """Print the base model, its dtype, the device and the number of processes."""
        runtime = self.job.runtime
        if runtime.is_main:
            spread = f", {runtime.world} processes ({runtime.kind})" if runtime.kind != "none" else ""
            say(f"{self.settings.model.base} in {str(self.dtype).removeprefix('torch.')} on {self.device}{spread}")


def with_rows(ctx: typer.Context, flags: RunFlags, settings: Settings, *, name_tasks: bool) -> RunFlags:
    """Add the datasets in --rows. With ``name_tasks``, they are the tasks if --task was not given. Raises UsageError together with --dry-run."""
    from meteora_cli.commands.data_add import add_rows
    from meteora_core.errors import UsageError

    if flags.source.rows is None:
        return flags
    if flags.dry_run:
        raise UsageError("--rows adds datasets, and --dry-run writes nothing", hint=f"add them first: meteora data add {shlex.quote(flags.source.rows)}")
    names = add_rows(ctx, settings, flags.source.rows)
    return replace(flags, tasks=flags.tasks or names) if name_tasks else flags


def open_stage(ctx: typer.Context, flags: RunFlags, settings: Settings, out: Path, runtime: Runtime) -> Stage:
    """Return the training run that flags and settings describe; ``out`` is the folder that it writes."""
    from meteora_core.files import cache_dir
    from meteora_core.model.base import BaseReference, pick_device, pick_dtype
    from meteora_core.training.job import TrainJob

    base = BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code)
    job = TrainJob(base, settings.paths.data, out, flags.source.max_rows, cache_dir() / "tokens", flags.run.resume, flags.run.force, runtime)
    device = runtime.device or pick_device(settings.model.device)
    return Stage(ctx, flags, settings, job, device, pick_dtype(settings.model.dtype, device))


def command_line(ctx: typer.Context, *words: str, keep: Iterable[str] = ()) -> str:
    """Return a command line to suggest, quoted for a shell.

    Args:
        ctx: The context of the running command.
        words: The suggested command and its arguments.
        keep: The parameters of the running command to repeat if they were given.
    """
    given, flags = globals_of(ctx), given_flags(ctx)
    before = ["--config", str(given.config)] if given.config else []
    repeated = [word for name in keep if name in flags for word in (flags[name], str(ctx.params[name]))]
    return shlex.join(["meteora", *before, *words, *repeated])


def in_brackets(remarks: list[str]) -> str:
    """Return remarks in brackets, separated by commas, to append to a line; an empty string without remarks."""
    return f" ({', '.join(remarks)})" if remarks else ""


def scored_tasks(settings: Settings, tasks: Iterable[str]) -> list[str]:
    """Return the tasks that ``meteora eval`` can score, which have a metric and test rows."""
    from meteora_core.data.rows import split_path
    from meteora_core.data.tasks import TASKS

    return [task for task in tasks if task in TASKS and split_path(settings.paths.data, task, "test").is_file()]


def say_next(ctx: typer.Context, commands: Iterable[tuple[str, str]]) -> None:
    """Print the commands to run next, each with its purpose; nothing with --quiet."""
    if globals_of(ctx).quiet:
        return
    say("")
    say("Next:")
    for command, purpose in commands:
        say(f"  {command}", style="bold")
        say(f"    {purpose}")
