"""What the commands share: JSON and text on stdout, progress bars, settings from the flags.

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
    """The options that stand before the command."""

    config: Path | None = None
    verbose: int = 0
    quiet: bool = False


def globals_of(ctx: typer.Context) -> Globals:
    """The options that stood before the command."""
    return ctx.obj if isinstance(ctx.obj, Globals) else Globals()


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout.

    Characters that it cannot hold, halves of surrogate pairs, and control and format characters are written as JSON's own escapes, so that the
    document is exact and safe to show; a number that is NaN or infinite, which JSON has no word for, is written as null.
    """
    from meteora_core.json_files import finite

    value = finite(value)
    text = json.dumps(value, ensure_ascii=False, indent=2, default=str)
    if not _is_utf8(sys.stdout) or not _has_utf8(text):
        text = json.dumps(value, ensure_ascii=True, indent=2, default=str)
    sys.stdout.write(json_printable(text) + "\n")
    sys.stdout.flush()


def write_text(text: str) -> None:
    """Write running text to stdout at once, such as a piece of an answer or a whole document; see :func:`meteora_core.text.printable`."""
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
    """Let stdout and stderr put "?" for a character that their encoding lacks, where they would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


class _PrintableRecord(logging.LogRecord):
    """A log record whose message is safe to print, whichever handler prints it."""

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()), multiline=True)


def guard_messages() -> None:
    """Make log messages, warnings and tracebacks safe to print: they quote names from files just as errors do."""
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _format_warning
    sys.excepthook = _show_traceback


def _format_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return printable(redact(f"{filename}:{lineno}: {category.__name__}: {message}\n"), multiline=True)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable(redact("".join(traceback.format_exception(kind, error, trace))), multiline=True))


def valid_text(text: str, name: str) -> str:
    """What was given on the command line as text that can be encoded; bytes that are not UTF-8 are replaced, and a note says so.

    Args:
        text: As Python decoded it: such a byte is half of a surrogate pair.
        name: For the note, such as ``--prompt``.
    """
    if _has_utf8(text):
        return text
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves that no byte on a command line gives
        raw = text.encode("utf-8", "surrogatepass")
    try:
        return raw.decode()
    except UnicodeDecodeError as broken:
        note_replaced(name, broken.start)
        return raw.decode(errors="replace")


def note_replaced(name: str, place: int) -> None:
    """Say on stderr that bytes were replaced, the first of them at ``place`` (from 0) of what ``name`` stands for."""
    say(f"note: {name} is not UTF-8 at byte {place + 1}; what cannot be read is replaced by \N{REPLACEMENT CHARACTER}", style="yellow")


def settings_from(ctx: typer.Context, **flags: Any) -> Settings:
    """The settings in force: the environment, the settings file, and above them what was given on the command line.

    Args:
        ctx: The context of the command; its options that are settings (:mod:`meteora_cli.option_settings`) are looked up there.
        flags: Further values as ``section__name=value``; None means that the flag was not given.

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
    """The setting that --load-in-4bit and --load-in-8bit stand for; None when neither was given. Raises UsageError for both."""
    if in_4bit and in_8bit:
        from meteora_core.errors import UsageError

        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other", hint="choose one of them")
    return "4bit" if in_4bit else "8bit" if in_8bit else None


def _amount(task: RichTask) -> str:
    """Done, total and unit; bytes as MB."""
    unit = task.fields.get("unit", "it")
    if unit == "B":
        done, total = task.completed / 1e6, None if task.total is None else task.total / 1e6
        return f"{done:.1f}{'' if total is None else f'/{total:.1f}'} MB"
    return f"{task.completed:.0f}{'' if task.total is None else f'/{task.total:.0f}'} {unit}"


def _columns() -> list[ProgressColumn]:
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """Done, total and unit; bytes as MB."""

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
"""Seconds between two lines about the same work where there is no terminal to draw a bar on."""


class _RichBar:
    def __init__(self, bars: RichProgress, identity: TaskID, plain: bool) -> None:
        self._bars, self._id, self._fields, self._plain = bars, identity, dict[str, str](), plain
        self._said = time.monotonic()

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self._fields.update(fields)
        extra = "  ".join(f"{key} {printable(value)}" for key, value in self._fields.items())
        self._bars.update(self._id, advance=advance, extra=extra, **({} if total is None else {"total": total}))  # type: ignore[arg-type]
        if self._plain and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self.say()

    def say(self) -> None:
        """Print how far the work is, in one line."""
        task = next(task for task in self._bars.tasks if task.id == self._id)
        left = "" if task.time_remaining is None or task.finished else f", {task.time_remaining:.0f} s left"
        extra = f"  {task.fields['extra']}" if task.fields["extra"] else ""
        say(f"{task.description}: {_amount(task)} in {task.elapsed or 0:.0f} s{left}{extra}")

    @property
    def said_something(self) -> bool:
        """Whether the work has figures of its own to report at its end."""
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
    """Yield a Progress that draws bars on stderr; without a terminal it prints a line at the start of each piece of work, every
    ten seconds and, where there are figures such as a loss, at its end; with --quiet nothing."""
    if ctx is not None and globals_of(ctx).quiet:
        yield _Quiet()
        return
    from rich.progress import Progress as Bars

    bars = Bars(*_columns(), console=console, transient=False, disable=not console.is_terminal, refresh_per_second=4)
    with bars:
        yield _RichProgress(bars, plain=not console.is_terminal)


def usage_failure(error: BaseException) -> MeteoraError | None:
    """The error to report for a command line that Typer does not understand; None for any other error.

    Raises:
        SystemExit: The command line asked for nothing, and the help has been shown instead.
    """
    from meteora_core.errors import UsageError

    kind = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")  # of click, or of Typer's own copy of it
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
    """The end of a message about an unknown name: the closest of ``choices``, if one is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _options_of(context: Any) -> list[str]:
    parameters = getattr(getattr(context, "command", None), "params", ())
    return [flag for parameter in parameters if not getattr(parameter, "hidden", False) for flag in (*parameter.opts, *parameter.secondary_opts)]


def _command_with(option: str, context: Any) -> str | None:
    """The sibling of a context's command that has the option, with the words that name it."""
    parent = getattr(context, "parent", None)
    if parent is None or parent.parent is None:
        return None
    for name, command in getattr(parent.command, "commands", {}).items():
        if command is not context.command and any(option in (*each.opts, *each.secondary_opts) for each in command.params):
            return f"{parent.command_path} {name}"
    return None


def report_error(error: BaseException) -> None:
    """One line on stderr, and the hint below it."""
    console.print(error_lines(getattr(error, "message", str(error)), getattr(error, "hint", None)), soft_wrap=True)
