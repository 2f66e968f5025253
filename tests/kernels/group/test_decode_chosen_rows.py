"""Decoding with the chosen rows of A only, against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing, plan
from meteora_kernels.arguments import span_of
from meteora_kernels.group import row_for, run_group
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, RANKS, check_equals_reference, check_rounded_once, check_ties, members, nan_stays
from support.kernel_rows import taking

SMALL = Row("decode_chosen_rows", pieces=3, tile=Tile(outputs=16, step=16, warps=2, stages=2, gate_rows=16, gate_step=16, down_rows=4, down_step=16))
"""A row with steps and pieces so short that 72 columns are several, of which the last is shorter."""
TALL = Row("decode_chosen_rows", pieces=5, tile=Tile(outputs=32, step=32, warps=2, stages=3, gate_rows=16, gate_step=32, down_rows=16, down_step=16))
PLAIN = Row("decode_chosen_rows", pieces=4, tile=Tile(outputs=32, step=128, warps=2, stages=5, gate_rows=16, gate_step=256, down_rows=8, down_step=256))
EVERY = Row("decode_all_rows", tile=Tile(outputs=32, step=16, warps=2, stages=2, gate_rows=16, gate_step=32))


@pytest.mark.parametrize("tokens", [1, 5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "widths", "hidden", "top_k", "row"),
    [
        pytest.param(RANKS, (24, 9, 33), 72, 2, PLAIN, id="mixed"),
        pytest.param(RANKS, (24, 9, 33), 72, 2, SMALL, id="mixed-small"),
        pytest.param(RANKS, (24, 9), 72, 2, TALL, id="mixed-tall"),
        pytest.param(RANKS, (40,), 20, 5, TALL, id="all-adapters"),
        pytest.param((0, 0, 0), (24, 9), 48, 2, SMALL, id="no-rows"),
        pytest.param((2,) * 40, (24, 9), 64, 3, TALL, id="40x2-top3"),
        pytest.param((64, 3), (33,), 72, 1, TALL, id="rank-64"),
        pytest.param((64, 0, 0, 0, 1), (33,), 48, 1, TALL, id="rank-64-far-above-the-mean"),
        pytest.param((0, 5, 1, 9, 0, 3, 2, 7, 4), (9,), 48, 8, TALL, id="mixed-top8"),
        pytest.param((1,) * 300, (20,), 80, 16, TALL, id="300x1-top16", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, top_k: int, row: Row, tokens: int) -> None:
    """Pieces do not divide h, rows and outputs do not fill a block, there are a bias and a mask, and two runs are bit-equal."""
    given = members(widths, tokens, ranks=ranks, hidden=hidden, bias=tokens == 5)
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if tokens == 5 and top_k < 3 else None
    check_equals_reference(given, row, Routing(top_k, 1.5, allowed))


def test_a_rank_of_256_equals_the_reference() -> None:
    """With few tokens, because the time of the interpreter grows with the rank and the number of tokens."""
    check_equals_reference(members((20,), 2, ranks=(256, 0), hidden=33), PLAIN, Routing(2, 1.5))


@pytest.mark.parametrize("row", [SMALL, TALL], ids=["small", "tall"])
def test_rounds_once(row: Row) -> None:
    check_rounded_once(members((40, 24), 8, dtype=torch.float16), row, most=1.15)


def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    check_ties(members((24,), 6, dtype=torch.float16), SMALL)


def test_nan_stays_in_its_token_and_in_its_adapter() -> None:
    nan_stays(members((24, 9), 5), SMALL)


def test_reads_rows_with_gaps() -> None:
    """The rows of the weights may have gaps, which may hold B^T."""
    check_equals_reference(members((24, 9, 33), 3, bias=True, gap=24), SMALL)
    check_equals_reference(members((24, 9, 33), 3, bias=True, has_up=True), SMALL, in_place=True)


def test_groups_decode_by_the_row_that_fits() -> None:
    """The outputs of both decoding paths agree up to rounding, and the next row is used for more tokens than a tile holds."""
    given = members((24, 9), 4)
    outputs = []
    for first, second in ((SMALL, EVERY), (EVERY, SMALL)):
        with taking(first, second, Row("packed")):
            outputs.append(run_group(given.x, given.group, Routing()))
            assert row_for(given.group, 16, 2) is first
            assert row_for(given.group, 17, 2).path == "packed"
    torch.testing.assert_close(*outputs, rtol=2e-4, atol=2e-4)
    assert row_for(given.group, 16, 2).path == "decode_chosen_rows"


def test_spans_cover_the_columns_in_whole_steps() -> None:
    for hidden in (20, 72, 4096, 11008, 14336):
        for row in plan.table.shipped("h100").group:
            if row.path == "decode_chosen_rows" and row.tile is not None:
                for step in (row.tile.gate_step, row.tile.down_step, 16):
                    columns = span_of(hidden, row.pieces, step)
                    assert columns % step == 0
                    assert (row.pieces - 1) * columns < hidden + row.pieces * step
                    assert columns * row.pieces >= hidden
    assert [span_of(hidden, 4, 256) for hidden in (4096, 11008, 14336)] == [1024, 2816, 3584]
