"""Consoles, tables and panels that show text of unknown origin literally.

Dataset rows, names in checkpoints and adapters, tensor names, settings, answers, and errors that quote any of these may hold escape sequences or
Rich's markup. A :class:`Terminal` never interprets them, so that commands need not escape text. The other modules of ``meteora_cli`` print only through
this module, which ``tests/cli/test_display.py`` checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RichCast
from rich.panel import Panel
from rich.segment import Segment
from rich.status import Status
from rich.style import Style
from rich.table import Table
from rich.text import Text

from meteora_core.text import one_line, printable, redact


class Terminal(Console):
    """A Rich console without markup, emoji codes and highlighting, which escapes control and format characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string as Rich does, after making it printable."""
        return super().render_str(printable(text, multiline=True), **{**options, "markup": False, "emoji": False})

    def render(self, renderable: ConsoleRenderable | RichCast | str, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Rich does. Text is made printable before it is wrapped, and so is every segment of other renderables."""
        if isinstance(renderable, Text):
            renderable = safe_text(renderable)
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield Segment(printable(segment.text, multiline=True), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Return a status display as Rich does; a string is shown literally."""
        return _Status(_literal(status), console=self, **options)


class _Status(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _literal(status), **options)


def _literal(content: RenderableType) -> RenderableType:
    return Text(printable(content, multiline=True)) if isinstance(content, str) else content


def safe_text(text: Text) -> Text:
    """Return ``text`` with the same styles and printable characters."""
    if printable(text.plain, multiline=True) == text.plain:
        return text
    result = text.blank_copy()
    for number, line in enumerate(text.split("\n", allow_blank=True)):
        if number:
            result.append("\n")
        start = 0
        plain = line.plain
        for index, character in enumerate(plain):
            shown = printable(character, multiline=True)
            if shown != character:
                result.append_text(line[start:index])
                result.append(shown, line.get_style_at_offset(console, index))
                start = index + 1
        result.append_text(line[start:])
    return result


def cell(value: object, style: str | Style = "", **options: Any) -> Text:
    """Return a name or value as one line with all unusual characters escaped. ``options`` are those of Rich's Text."""
    return Text(printable(str(value)), style, **options)


def body(text: str, style: str | Style = "", **options: Any) -> Text:
    """Return running text, such as a dataset's row or an answer, with line feeds and tabs. ``options`` are those of Rich's Text."""
    return Text(printable(text, multiline=True), style, **options)


class DataTable(Table):
    """A Rich table that shows the strings of titles, column headings and cells literally."""

    def __init__(self, *headers: str, title: str | None = None, caption: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else cell(title), caption=None if caption is None else body(caption), **options)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **options: Any) -> None:
        """Add a column as Rich does; a string is shown literally."""
        super().add_column(cell(header) if isinstance(header, str) else header, cell(footer) if isinstance(footer, str) else footer, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row as Rich does; a string is shown literally, and wrapped if it is long."""
        super().add_row(*(cell(each, overflow="fold") if isinstance(each, str) else each for each in cells), **options)


def panel(content: RenderableType, title: object, *, subtitle: object = None, **options: Any) -> Panel:
    """Return a frame around ``content``. A string is shown as running text, and the titles as names."""
    inside = body(content) if isinstance(content, str) else content
    below = None if subtitle is None else subtitle if isinstance(subtitle, Text) else cell(subtitle)
    return Panel(inside, title=title if isinstance(title, Text) else cell(title), subtitle=below, **options)


console = Terminal(stderr=True)
"""The console for notes, progress and errors, which writes to stderr."""

out = Terminal()
"""The console for results, which writes to stdout."""


def say(text: str, *, style: str = "") -> None:
    """Print one line to the user on stderr."""
    console.print(cell(text, style), soft_wrap=True)


def put(text: str, *, style: str = "") -> None:
    """Print one line of a result on stdout."""
    out.print(cell(text, style), soft_wrap=True)


def error_lines(message: object, hint: object = None) -> Text:
    """Return the message of an error and its hint, one line each."""
    text = Text.assemble(("error: ", "bold red"), one_line(redact(str(message))))
    if hint:
        text.append("\n").append("hint: ", "bold yellow").append(one_line(redact(str(hint))))
    return text
