"""The only way to the terminal: consoles, tables and panels that show text of unknown origin as it is.

Dataset rows, names in checkpoints and adapters, tensor names, settings, answers, and errors that quote any of these may hold escape sequences or
Rich's markup. A :class:`Terminal` interprets neither, whatever is printed with it, so that no command has to remember to escape. The other modules
of ``meteora_cli`` print with what this module provides (``tests/cli/test_display.py`` checks that).
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
    """A Rich console without markup, emoji codes and highlighting, in which control and format characters are escaped on their way out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Like Rich's, of the text made printable."""
        return super().render_str(printable(text, multiline=True), **{**options, "markup": False, "emoji": False})

    def render(self, renderable: ConsoleRenderable | RichCast | str, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Like Rich's; text is made printable before it is wrapped, and every segment once more."""
        if isinstance(renderable, Text):
            renderable = safe_text(renderable)
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield Segment(printable(segment.text, multiline=True), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Like Rich's; a string is shown as it is."""
        return _Status(_literal(status), console=self, **options)


class _Status(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _literal(status), **options)


def _literal(content: RenderableType) -> RenderableType:
    return Text(printable(content, multiline=True)) if isinstance(content, str) else content


def safe_text(text: Text) -> Text:
    """``text`` with the same styles, its characters made printable."""
    if printable(text.plain, multiline=True) == text.plain:
        return text
    result = text.blank_copy()
    for place, line in enumerate(text.split("\n", allow_blank=True)):
        if place:
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
    """A name or value for a table or a line: one line, everything unusual escaped. ``options`` are those of Rich's Text."""
    return Text(printable(str(value)), style, **options)


def body(text: str, style: str | Style = "", **options: Any) -> Text:
    """Running text, such as a dataset's row or an answer: line feeds and tabs stay. ``options`` are those of Rich's Text."""
    return Text(printable(text, multiline=True), style, **options)


class DataTable(Table):
    """A Rich table whose strings are shown as they are: title, column headings and cells."""

    def __init__(self, *headers: str, title: str | None = None, caption: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else cell(title), caption=None if caption is None else body(caption), **options)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **options: Any) -> None:
        """Like Rich's; a string is shown as it is."""
        super().add_column(cell(header) if isinstance(header, str) else header, cell(footer) if isinstance(footer, str) else footer, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Like Rich's; a string is shown as it is, wrapped if it is long."""
        super().add_row(*(cell(each, overflow="fold") if isinstance(each, str) else each for each in cells), **options)


def panel(content: RenderableType, title: object, *, subtitle: object = None, **options: Any) -> Panel:
    """A frame around ``content``; a string is shown as running text, and the titles as names."""
    inside = body(content) if isinstance(content, str) else content
    below = None if subtitle is None else subtitle if isinstance(subtitle, Text) else cell(subtitle)
    return Panel(inside, title=title if isinstance(title, Text) else cell(title), subtitle=below, **options)


console = Terminal(stderr=True)
"""For people: notes, progress, errors. Goes to stderr."""

out = Terminal()
"""For results: tables and text. Goes to stdout."""


def say(text: str, *, style: str = "") -> None:
    """Print one line for people on stderr."""
    console.print(cell(text, style), soft_wrap=True)


def put(text: str, *, style: str = "") -> None:
    """Print one line of a result on stdout."""
    out.print(cell(text, style), soft_wrap=True)


def error_lines(message: object, hint: object = None) -> Text:
    """An error's message and its hint, one line each."""
    text = Text.assemble(("error: ", "bold red"), one_line(redact(str(message))))
    if hint:
        text.append("\n").append("hint: ", "bold yellow").append(one_line(redact(str(hint))))
    return text
