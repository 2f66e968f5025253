"""The PNG picture."""

from __future__ import annotations

import builtins
import io

import numpy as np
import pytest

from meteora_core.errors import UsageError
from meteora_core.trace.image import COLUMNS, MOST_LINES, to_png, visible_pieces
from meteora_core.trace.palette import look, parse
from support.route_pictures import make_picture


def pixels(data: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(int)


def test_every_adapter_is_in_the_picture_with_its_hue() -> None:
    picture = make_picture(["Is", " it $x^", "\n", "日本", " Yes"] * 4, adapters=5)
    image = pixels(to_png(picture, "Costs $5"))
    colours = {tuple(colour) for colour in image.reshape(-1, 3)[::1]}
    for index in set(picture.speakers().tolist()):
        assert parse(look(index).hue) in colours
    assert image.shape[1] == 1100


def test_another_text_is_another_picture() -> None:
    assert to_png(make_picture(["a", "b", "c"])) != to_png(make_picture(["a", "b", "c"], seed=1))
    assert to_png(make_picture(["a", "b", "c"])) == to_png(make_picture(["a", "b", "c"]))


def test_the_layout_loses_nothing_and_stays_in_its_columns() -> None:
    picture = make_picture(["word" * 60, "\n", " x", "日" * 50, "", "\x1b"], answers=1)
    pieces, cut = visible_pieces(picture)
    assert cut == 0
    assert "".join(piece.text for piece in pieces) == "word" * 60 + "⏎ x" + "日" * 50 + "··"
    assert all(piece.column + piece.width <= COLUMNS + 1 for piece in pieces)
    ends: dict[int, int] = {}
    for piece in pieces:
        assert piece.column == ends.get(piece.line, 0)
        ends[piece.line] = piece.column + piece.width


def test_a_long_text_shows_its_end() -> None:
    picture = make_picture([f"line {number}\n" for number in range(MOST_LINES + 40)], answers=0)
    pieces, cut = visible_pieces(picture)
    assert cut == 40
    assert max(piece.line for piece in pieces) == MOST_LINES - 1
    assert pieces[-1].text == f"line {MOST_LINES + 39}⏎"
    assert to_png(picture).startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_do(monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="need matplotlib") as raised:
        to_png(make_picture(["a", "b", "c"]))
    assert "meteora-lora[plot]" in raised.value.hint
