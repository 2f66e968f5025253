"""Entries of tables: refused values, and the round trip through TOML."""

from __future__ import annotations

from typing import Any

import pytest

from meteora_kernels.plan.table import LAYER_PATHS, Row, Span, format_row, parse, shipped
from meteora_kernels.tile import Tile

TILE = Tile(64, 64, 128, 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "apart"}, "unknown path 'apart'"),
        ({"path": "packed", "tokens": Span(65, 64)}, "must be a range"),
        ({"path": "packed", "way": "few"}, "has no way 'few'"),
        ({"path": "many_adapters"}, "has no way ''"),
        ({"path": "packed", "pieces": -1}, "0 or more"),
        ({"path": "packed", "tile": TILE}, "in pieces"),
        ({"path": "packed", "pieces": 1, "tile": TILE._replace(step=8)}, "16 or more"),
        ({"path": "packed", "pieces": 1, "tile": TILE._replace(outputs=96)}, "powers of two"),
        ({"path": "packed", "pieces": 1, "tile": TILE._replace(stages=0)}, "one stage"),
        ({"path": "packed", "pieces": 1, "tile": TILE, "gate_pieces": 2}, "'chosen_adapters' and 'wide' only"),
        ({"path": "packed", "in_place": True}, "only 'wide'"),
        ({"path": "wide", "gate_pieces": 2}, "needs a tile"),
        ({"path": "wide", "pieces": 2, "tile": TILE, "gate_pieces": 2}, "those of gates and A"),
        ({"path": "one_launch", "tokens": Span(17, 64), "pieces": 1, "tile": TILE}, "pieces of both kinds"),
        ({"path": "one_launch", "tokens": Span(17, 64), "pieces": 1, "gate_pieces": 2}, "needs a tile"),
        ({"path": "one_launch", "tokens": Span(17, 65), "pieces": 1, "gate_pieces": 2, "tile": TILE}, "holds all tokens"),
        ({"path": "one_launch", "tokens": Span(17, 64), "pieces": 5, "gate_pieces": 2, "tile": TILE}, "16 outputs for every piece"),
        ({"path": "few_tokens", "way": "all_rows"}, "needs a tile"),
    ],
)
def test_entries_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ('[[group]]\npath = "few_tokens"', "entry 1 of group: path must be one of"),
        ("[[layer]]\ntokens = 3", "entry 1 of layer: path must be one of"),
        ('[[group]]\npath = "packed"\n[[group]]\npath = "packed"\nwidth = 3', "entry 2 of group: unknown key 'width'"),
        ('[[group]]\npath = "packed"\ntokens = "few"', "tokens must be a number or two"),
        ('[[group]]\npath = "packed"\ntokens = [1, 2, 3]', "tokens must be a number or two"),
        ('[[group]]\npath = "packed"\npieces = true', "pieces must be int, not bool"),
        ('[[group]]\npath = "packed"\nhalf = 1', "half must be bool, not int"),
        ('[[group]]\npath = "packed"\npieces = 1\ntile = { width = 3 }', "unknown key 'width' in tile"),
        ('[[group]]\npath = "packed"\npieces = 1\ntile = { step = "long" }', "tile must be a table of numbers"),
        ('[[group]]\npath = "packed"\npieces = 1\ntile = 3', "tile must be a table of numbers"),
        ("= 3", "Invalid statement"),
    ],
)
def test_files_without_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, "test")


def test_what_is_written_is_read_back() -> None:
    h100 = shipped("h100")
    for kind, rows in (("group", h100.group), ("layer", h100.layer)):
        text = "\n\n".join(f"[[{kind}]]\n{format_row(row)}" for row in rows)
        assert getattr(parse(text, "test"), kind) == rows
    assert parse("", "empty").group == ()
    assert all(row.path in LAYER_PATHS for row in h100.layer)


def test_a_number_is_at_least_and_two_are_from_and_to() -> None:
    table = parse('rows_of = "h100"\n[[group]]\npath = "split"\ntokens = 65\nhidden = [64, 128]', "mine")
    assert table.group[0] == Row("split", Span(65), hidden=Span(64, 128))
    assert table.group[1:] == shipped("h100").group
