"""The routes of one text as a PNG picture: the coloured text, and the weight of each adapter by token, layer and kind of linear layer."""

from __future__ import annotations

import io
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meteora_core.errors import UsageError
from meteora_core.trace.palette import look, parse, tint
from meteora_core.trace.picture import RoutePicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 96
"""Number of characters in a line of the text."""
MOST_LINES = 60
"""Maximum number of lines. Of a longer text, the last lines are shown, with a note."""
_WIDTH, _LINE, _DPI = 11.0, 0.26, 100


@dataclass(frozen=True)
class Piece:
    """The part of a token that is on one line of the text.

    Attributes:
        line: Index of the line.
        column: Column of the first character, in character cells.
        width: Width in character cells.
        text: Text to draw.
        token: Index of the token.
    """

    line: int
    column: int
    width: int
    text: str
    token: int


def to_png(picture: RoutePicture, title: str = "Routing") -> bytes:
    """Draw the picture.

    Args:
        picture: The routes to show.
        title: Title above the picture.

    Returns:
        The bytes of the PNG file.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise UsageError(
            "PNG pictures need matplotlib, which is not installed", hint="pip install 'meteora-lora[plot]', or choose a name that ends in .html"
        ) from missing

    pieces, cut = visible_pieces(picture)
    lines = max((piece.line for piece in pieces), default=0) + 1
    names, count = picture.names, len(picture.names)
    legend_rows = -(-count // 4)
    heights = [
        0.55 + 0.28 * legend_rows,
        lines * _LINE + 0.2,
        max(1.0, 0.17 * count) + 0.55,
        max(2.0, 0.13 * len(picture.layers)) + 0.35 + 0.07 * max(map(len, names)),
    ]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.3), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    bands = _bands(heights, sum(heights) + 0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        _draw_legend(figure, bands[0], picture, title, cut)
        _draw_text(figure, bands[1], picture, pieces, lines)
        _draw_tokens(figure, bands[2], picture)
        _draw_layers(figure, bands[3], picture)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "meteora"})
    return buffer.getvalue()


def visible_pieces(picture: RoutePicture) -> tuple[list[Piece], int]:
    """Lay out the text in lines. Returns the pieces of the visible lines and the number of lines left out at the beginning."""
    pieces: list[Piece] = []
    line = column = 0
    role = picture.tokens[0].role if picture.tokens else "prompt"
    for position, token in enumerate(picture.tokens):
        if token.role != role:
            role = token.role
            line, column = (line + 1 if column else line), 0
        text, start, width = "", column, 0
        for character in token.text or "·":
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 0 if unicodedata.combining(character) else 1
            if column + cells > COLUMNS and character != "\n":
                pieces.append(Piece(line, start, width, text, position))
                line, column, start, width, text = line + 1, 0, 0, 0, ""
            shown = "⏎" if character == "\n" else " " if character.isspace() else character if character.isprintable() else "·"
            text, width, column = text + shown, width + cells, column + cells
            if character == "\n":
                pieces.append(Piece(line, start, max(width, 1), text, position))
                line, column, start, width, text = line + 1, 0, 0, 0, ""
        if text:
            pieces.append(Piece(line, start, width, text, position))
    last = max((piece.line for piece in pieces), default=0)
    cut = max(0, last + 1 - MOST_LINES)
    return [Piece(piece.line - cut, piece.column, piece.width, piece.text, piece.token) for piece in pieces if piece.line >= cut], cut


def _bands(heights: list[float], total: float) -> list[tuple[float, float]]:
    """The (bottom, height) of every horizontal band in inches, from top to bottom."""
    bands, top = [], total - 0.15
    for height in heights:
        bands.append((top - height, height))
        top -= height
    return bands


def _axes(figure: Figure, band: tuple[float, float], left: float, width: float, below: float = 0.0, above: float = 0.0) -> Axes:
    total = figure.get_figheight()
    return figure.add_axes((left / _WIDTH, (band[0] + below) / total, width / _WIDTH, (band[1] - below - above) / total))


def _draw_legend(figure: Figure, band: tuple[float, float], picture: RoutePicture, title: str, cut: int) -> None:
    axes = _axes(figure, band, 0.3, _WIDTH - 0.6)
    axes.set_axis_off()
    axes.set_xlim(0, _WIDTH - 0.6)
    axes.set_ylim(band[1], 0)
    axes.text(0, 0.12, _plain(title), fontsize=13, fontweight="bold", va="center")
    about = " · ".join(f"{key} {value}" for key, value in picture.about.items()) + (f" · the first {cut} lines are not shown" if cut else "")
    axes.text(0, 0.38, _plain(about), fontsize=8, color="#565c66", va="center")
    totals = picture.total("answer" if any(token.role == "answer" for token in picture.tokens) else None).tolist()
    for index, name in enumerate(picture.names):
        x, y = 2.6 * (index % 4), 0.66 + 0.28 * (index // 4)
        _mark(axes, index, x, y + 0.06, 0.22, 0.05)
        axes.add_patch(_rectangle(x, y - 0.1, 0.22, 0.16, tint(index, 1.0)))
        axes.text(x + 0.3, y, _plain(f"{name[:30]}  {100 * totals[index]:.0f} %"), fontsize=8, va="center")


def _draw_text(figure: Figure, band: tuple[float, float], picture: RoutePicture, pieces: list[Piece], lines: int) -> None:
    axes = _axes(figure, band, 0.3, _WIDTH - 0.6, 0.05, 0.05)
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(lines, 0)
    speakers, shares = picture.speakers().tolist(), picture.shares()
    size = 72 * (_WIDTH - 0.6) / COLUMNS / 0.602
    for piece in pieces:
        adapter = speakers[piece.token]
        weight = "bold" if picture.tokens[piece.token].role == "answer" else "normal"
        axes.add_patch(_rectangle(piece.column, piece.line + 0.08, piece.width, 0.74, tint(adapter, float(shares[piece.token, adapter]))))
        _mark(axes, adapter, piece.column, piece.line + 0.82, piece.width, 0.1)
        axes.text(piece.column, piece.line + 0.62, _plain(piece.text), family="DejaVu Sans Mono", fontsize=size, fontweight=weight, color="black")


def _mark(axes: Axes, adapter: int, x: float, y: float, width: float, height: float) -> None:
    """Draw the strip below a token in the adapter's hue and pattern."""
    style = look(adapter)
    hatch: dict[str, Any] = {"plain": {}, "dashed": {"hatch": "||"}, "dotted": {"hatch": "...."}, "double": {"hatch": "--"}}[style.pattern]
    axes.add_patch(_rectangle(x, y, width, height, style.hue, **hatch))


def _rectangle(x: float, y: float, width: float, height: float, colour: str, hatch: str | None = None) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white" if hatch else "none", linewidth=0, hatch=hatch)


def _draw_tokens(figure: Figure, band: tuple[float, float], picture: RoutePicture) -> None:
    axes = _axes(figure, band, 2.3, _WIDTH - 2.6, 0.35, 0.2)
    values = picture.shares().t().numpy()
    axes.imshow(_coloured(values, len(picture.names)), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(picture.names)), [_plain(name) for name in picture.names], fontsize=7)
    axes.set_xlabel("token", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("weight by token", fontsize=8, loc="left", color="#565c66")
    answers = [position for position, token in enumerate(picture.tokens) if token.role == "answer"]
    if answers:
        axes.axvline(answers[0] - 0.5, color="black", linewidth=0.8, linestyle=":")


def _draw_layers(figure: Figure, band: tuple[float, float], picture: RoutePicture) -> None:
    role: Any = "answer" if any(token.role == "answer" for token in picture.tokens) else None
    longest = max(map(len, picture.names))
    half = (_WIDTH - 1.8) / 2
    for table, labels, left, title in (
        (picture.by_layer(role), [str(number) for number in picture.layers], 0.7, "weight by decoder layer"),
        (picture.by_kind(role), list(picture.kinds), 1.4 + half, "weight by kind of linear"),
    ):
        axes = _axes(figure, band, left, half, 0.1 + 0.07 * longest, 0.25)
        axes.imshow(_coloured(table.numpy(), len(picture.names), across=True), aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(picture.names)), [_plain(name) for name in picture.names], fontsize=7, rotation=90)
        step = -(-len(labels) // 16)
        axes.set_yticks(range(0, len(labels), step), [_plain(label) for label in labels[::step]], fontsize=7)
        axes.set_title(title, fontsize=8, loc="left", color="#565c66")


def _coloured(values: Any, adapters: int, *, across: bool = False) -> Any:
    """RGBA colours of a table of weights, float (rows, columns, 4).

    The colour is the adapter's hue and its opacity the weight. Adapters are the rows, or the columns if ``across``.
    """
    import numpy as np

    hues = np.array([parse(look(index).hue) for index in range(adapters)], dtype=float) / 255
    rgb = np.broadcast_to(hues[None, :] if across else hues[:, None], (*values.shape, 3))
    return np.concatenate([rgb, np.clip(values, 0, 1)[..., None]], axis=-1)


def _plain(text: str) -> str:
    """Escape a text so that matplotlib does not parse it as mathematics."""
    return text.replace("$", r"\$")
