"""Shows text with its routes in a terminal: colours, a legend, and word-wrapped streaming."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from meteora_core.text import printable
from meteora_core.trace.palette import HUES, look, tint

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from meteora_core.trace.picture import RoutePicture

_PATTERNS = {"plain": "", "dashed": "underline", "dotted": "italic", "double": "bold underline"}
_SIXTEEN = (
    "black on yellow",
    "black on cyan",
    "black on green",
    "black on bright_yellow",
    "white on blue",
    "white on red",
    "white on magenta",
)
"""The styles for terminals with 16 colours, one per hue of the palette, because tints would be indistinguishable."""


class Painter:
    """Chooses the style of every token by its adapter.

    Text is black on a tint, so that light and dark terminals show the same. Without colour (NO_COLOR, a dumb terminal or a pipe), the name of the
    adapter precedes the first token after each change of adapter.

    Args:
        console: The console that prints the text.
        names: The names of the adapters.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.names = names
        self.system = None if console.no_color else console.color_system
        self._last: int | None = None

    def style(self, adapter: int, weight: float) -> Style:
        """Return the style of a token, given its adapter and the adapter's mean weight; an empty style without colour."""
        if self.system is None:
            return Style.null()
        pattern = _PATTERNS[look(adapter).pattern]
        if self.system in ("standard", "windows"):
            return Style.parse(f"{_SIXTEEN[adapter % len(HUES)]} {pattern}".strip())
        return Style.parse(f"#000000 on {tint(adapter, weight)} {pattern}".strip())

    def pieces(self, text: str, adapter: int, weight: float) -> list[tuple[str, Style]]:
        """Return a token as styled parts; without colour, the name of the adapter precedes its first token."""
        pieces = [(text, self.style(adapter, weight))]
        if self.system is None and adapter != self._last and text:
            pieces.insert(0, (f"<{printable(self.names[adapter])}> ", Style.null()))
        if text:
            self._last = adapter
        return pieces

    def restart(self) -> None:
        """Begin a new text, whose first token names its adapter again."""
        self._last = None

    def swatch(self, adapter: int) -> tuple[str, Style]:
        """Return the mark of an adapter for legends and tables."""
        return ("   " if self.system is not None else "  ", self.style(adapter, 1.0))

    def legend(self, shares: Tensor, *, most: int = 8) -> Text:
        """Return one paragraph that lists the adapters by decreasing share."""
        values = shares.tolist()
        order = [index for index in sorted(range(len(values)), key=lambda index: -values[index]) if values[index] >= 0.005]
        text = Text()
        for index in order[:most]:
            text.append(*self.swatch(index))
            text.append(f" {printable(self.names[index])} {100 * values[index]:.0f} %   ")
        if len(order) > most:
            text.append(f"and {len(order) - most} more", style="dim")
        text.rstrip()
        return text


class StreamPrinter:
    """Prints styled text as it arrives, wrapped at words.

    Args:
        console: The console that prints the text.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._word: list[tuple[str, Style]] = []

    def add(self, text: str, style: Style) -> None:
        """Print text. A word at its end is held back until it is complete."""
        for run in re.findall(r"\n|[^\S\n]+|\S+", printable(text, multiline=True)):
            if run == "\n":
                self.flush()
                self._newline()
            elif run.isspace():
                self.flush()
                run = run.expandtabs(4)
                if self._column + cell_len(run) < self._console.width:
                    self._print(run, style)
                else:
                    self._newline()
            else:
                self._word.append((run, style))

    def flush(self) -> None:
        """Print the word that is held back."""
        width = sum(cell_len(text) for text, _ in self._word)
        if self._column and self._column + width > self._console.width:
            self._newline()
        for text, style in self._word:
            self._print(text, style)
        self._word = []

    def end(self) -> None:
        """Finish the text: print the word that is held back, and end an open line."""
        self.flush()
        if self._column:
            self._newline()

    def _print(self, text: str, style: Style) -> None:
        self._console.print(Text(text, style), end="", soft_wrap=True)
        self._column = (self._column + cell_len(text)) % max(1, self._console.width)

    def _newline(self) -> None:
        self._console.print()
        self._column = 0


def picture_text(picture: RoutePicture, painter: Painter, *, role: str | None = None) -> Text:
    """Return the coloured text of a picture, or of its tokens with one role."""
    speakers, shares = picture.speakers().tolist(), picture.shares()
    text = Text()
    painter.restart()
    for position, token in enumerate(picture.tokens):
        if role in (None, token.role):
            adapter = speakers[position]
            for piece, style in painter.pieces(printable(token.text, multiline=True), adapter, float(shares[position, adapter])):
                text.append(piece, style)
    return text
