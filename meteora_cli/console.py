"""Functions that the commands share: JSON and text on stdout, progress bars, and settings from flags.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import typer

from meteora_cli.display import console, error_lines, say
from meteora_cli.option_settings import OPTION_SETTINGS
from meteora_cli.typer_app import path_of
from meteora_core.text import json_printable, one_line, printable, redact

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, TaskID
    from rich.progress import Task as RichTask

    from meteora_core.errors import MeteoraError
    from meteora_core.progress import Progress, ProgressBar
    from meteora_core.settings import Settings


@dataclass
class Globals:
    """The values of the global options, which precede the command."""

    config: Path | None = None
    verbose: int = 0
    quiet: bool = False


def globals_of(ctx: typer.Context) -> Globals:
    """Return the values of the global options."""
    return ctx.obj if isinstance(ctx.obj, Globals) else Globals()


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout.

    Characters that the encoding of stdout lacks, lone surrogates, and control and format characters are written as JSON escapes, so that the document
    is exact and safe to print. NaN and infinite numbers, which JSON does not have, are written as null.
    """
    from meteora_core.json_files import finite

    value = finite(value)
    text = json.dumps(value, ensure_ascii=False, indent=2, default=str)
    if not _is_utf8(sys.stdout) or not _has_utf8(text):
        text = json.dumps(value, ensure_ascii=True, indent=2, default=str)
    sys.stdout.write(json_printable(text) + "\n")
    sys.stdout.flush()


def write_text(text: str) -> None:
    """Write text, such as a part of an answer or a document, to stdout and flush it; see :func:`meteora_core.text.printable`."""
    sys.stdout.write(printable(text, multiline=True))
    sys.stdout.flush()


def _is_utf8(stream: TextIO) -> bool:
    try:
        return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"
    except LookupError:
        return False


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def accept_all_text() -> None:
    """Make stdout and stderr print "?" for characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


class _PrintableRecord(logging.LogRecord):
    """A log record whose message is safe to print by any handler."""

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()), multiline=True)


def guard_messages() -> None:
    """Make log messages, warnings and tracebacks safe to print, because they can quote names from files."""
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _format_warning
    sys.excepthook = _show_traceback


def _format_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return printable(redact(f"{filename}:{lineno}: {category.__name__}: {message}\n"), multiline=True)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable(redact("".join(traceback.format_exception(kind, error, trace))), multiline=True))


def valid_text(text: str, name: str) -> str:
    """Return an argument of the command line as valid text. Bytes that are not UTF-8 are replaced, and a note says so.

    Args:
        text: The argument as Python decoded it, with lone surrogates for invalid bytes.
        name: The name of the argument in the note, such as ``--prompt``.
    """
    if _has_utf8(text):
        return text
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that do not come from bytes
        raw = text.encode("utf-8", "surrogatepass")
    try:
        return raw.decode()
    except UnicodeDecodeError as broken:
        note_replaced(name, broken.start)
        return raw.decode(errors="replace")


def note_replaced(name: str, offset: int) -> None:
    """Note on stderr that invalid bytes of the input ``name`` were replaced, the first one at ``offset`` (from 0)."""
    say(f"note: {name} is not UTF-8 at byte {offset + 1}; invalid bytes are replaced by \N{REPLACEMENT CHARACTER}", style="yellow")


def settings_from(ctx: typer.Context, **flags: Any) -> Settings:
    """Return the settings in effect, from the command line, the environment, the settings file and the defaults.

    Args:
        ctx: The context of the command, which provides the options that are settings (see :mod:`meteora_cli.option_settings`).
        flags: Further values of the command line, as ``section__name=value``; None means that a flag was not given.

    Raises:
        UsageError: The configuration is broken or a value is out of range.
    """
    from meteora_core.settings import load_settings

    given = {setting: ctx.params[name] for name, setting in OPTION_SETTINGS.get(path_of(ctx), {}).items()}
    given |= {key.replace("__", ".", 1): value for key, value in flags.items()}
    overrides: dict[str, Any] = {}
    for key, value in given.items():
        if value is not None:
            section, _, name = key.partition(".")
            overrides.setdefault(section, {})[name] = value
    return load_settings(globals_of(ctx).config, overrides)


def quantization_of(in_4bit: bool, in_8bit: bool) -> str | None:
    """Return the quantisation that --load-in-4bit and --load-in-8bit select; None if neither was given. Raises UsageError if both were given."""
    if in_4bit and in_8bit:
        from meteora_core.errors import UsageError

        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other", hint="choose one of them")
    return "4bit" if in_4bit else "8bit" if in_8bit else None


def _amount(task: RichTask) -> str:
    """Return the completed amount, the total and the unit of a task; bytes are shown as MB."""
    unit = task.fields.get("unit", "it")
    if unit == "B":
        done, total = task.completed / 1e6, None if task.total is None else task.total / 1e6
        return f"{done:.1f}{'' if total is None else f'/{total:.1f}'} MB"
    return f"{task.completed:.0f}{'' if task.total is None else f'/{task.total:.0f}'} {unit}"


def _columns() -> list[ProgressColumn]:
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """The column with the completed amount, the total and the unit."""

        def render(self, task: RichTask) -> Text:
            return Text(_amount(task))

    return [
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Amount(),
        TextColumn("{task.fields[extra]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


PLAIN_SECONDS = 10.0
"""The time between two lines about the same task without a terminal, in seconds."""


class _RichBar:
    def __init__(self, bars: RichProgress, identity: TaskID, plain: bool) -> None:
        self._bars, self._id, self._fields, self._plain = bars, identity, dict[str, str](), plain
        self._said = time.monotonic()

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self._fields.update(fields)
        extra = "  ".join(f"{key} {printable(value)}" for key, value in self._fields.items())
        self._bars.update(self._id, advance=advance, extra=extra, **({} if total is None else {"total": total}))  # type: ignore[arg-type]
        if self._plain and time.monotonic() - self._said >= PLAIN_SECONDS and not (self._fields and self._task.finished):
            self._said = time.monotonic()
            self.say()

    @property
    def _task(self) -> RichTask:
        return next(task for task in self._bars.tasks if task.id == self._id)

    def say(self) -> None:
        """Print the progress of the task in one line."""
        task = self._task
        left = "" if task.time_remaining is None or task.finished else f", {task.time_remaining:.0f} s left"
        extra = f"  {task.fields['extra']}" if task.fields["extra"] else ""
        say(f"{task.description}: {_amount(task)} in {task.elapsed or 0:.0f} s{left}{extra}")

    @property
    def said_something(self) -> bool:
        """Whether the task reported figures, such as a loss, to print at its end."""
        return bool(self._fields)


class _RichProgress:
    def __init__(self, bars: RichProgress, *, plain: bool) -> None:
        self._bars, self._plain = bars, plain

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        if self._plain:
            say(f"{title} …")
        identity = self._bars.add_task(printable(title), total=total, unit=unit, extra="")
        bar = _RichBar(self._bars, identity, self._plain)
        try:
            yield bar
            task = next(task for task in self._bars.tasks if task.id == identity)
            self._bars.update(identity, total=task.completed if task.total is None else task.total, completed=task.total or task.completed)
            if self._plain and bar.said_something:
                bar.say()
        finally:
            self._bars.stop_task(identity)

    def note(self, message: str) -> None:
        self._bars.console.print(one_line(redact(message)), soft_wrap=True)


class _Quiet:
    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        from meteora_core.progress import SILENT

        with SILENT.task(title, total=total, unit=unit) as task:
            yield task

    def note(self, message: str) -> None:
        return None


@contextmanager
def progress(ctx: typer.Context | None = None) -> Iterator[Progress]:
    """Yield a Progress that draws bars on stderr.

    Without a terminal, it prints a line at the start of each task, every ten seconds and, if there are figures such as a loss, at the end. With --quiet,
    it prints nothing.
    """
    if ctx is not None and globals_of(ctx).quiet:
        yield _Quiet()
        return
    from rich.progress import Progress as Bars

    bars = Bars(*_columns(), console=console, transient=False, disable=not console.is_terminal, refresh_per_second=4)
    with bars:
        yield _RichProgress(bars, plain=not console.is_terminal)


def usage_failure(error: BaseException) -> MeteoraError | None:
    """Return the error to report for an invalid command line; None for any other error.

    Raises:
        SystemExit: The command line names no command, and the help has been shown.
    """
    from meteora_core.errors import UsageError

    kind = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")  # in click, or in Typer's copy of it
    if isinstance(error, typer.Abort):
        return UsageError("stopped")
    if not isinstance(error, kind):
        return None
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.exit(2)
    path: str = getattr(context, "command_path", "meteora")
    hint = f"`{path} --help` lists the arguments and options"
    if type(error).__name__ == "NoSuchOption":
        name = str(getattr(error, "option_name", ""))
        if owner := _command_with(name, context):
            return UsageError(f"no such option {name} of `{path}`", hint=f"it is an option of `{owner}`")
        return UsageError(f"no such option {name}{_meant(name, _options_of(context))}", hint=hint)
    commands = list(getattr(getattr(context, "command", None), "commands", {}))
    message: str = error.format_message()  # type: ignore[attr-defined]
    if commands and message.startswith("No such command"):
        name = message.removeprefix("No such command '").partition("'")[0]
        return UsageError(f"no such command {name}{_meant(name, commands)}", hint=hint.replace("arguments and options", "commands"))
    return UsageError(message, hint=hint)


def _meant(name: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, which suggests the closest of ``choices``; empty if none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _options_of(context: Any) -> list[str]:
    parameters = getattr(getattr(context, "command", None), "params", ())
    return [flag for parameter in parameters if not getattr(parameter, "hidden", False) for flag in (*parameter.opts, *parameter.secondary_opts)]


def _command_with(option: str, context: Any) -> str | None:
    """Return the full name of another command in the same group that has the option; None if there is none."""
    parent = getattr(context, "parent", None)
    if parent is None or parent.parent is None:
        return None
    for name, command in getattr(parent.command, "commands", {}).items():
        if command is not context.command and any(option in (*each.opts, *each.secondary_opts) for each in command.params):
            return f"{parent.command_path} {name}"
    return None


def report_error(error: BaseException) -> None:
    """Print an error in one line on stderr, with its hint in the next."""
    console.print(error_lines(getattr(error, "message", str(error)), getattr(error, "hint", None)), soft_wrap=True)
