"""Decoding with all rows of A, against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, RANKS, check_equals_reference, check_rounded_once, check_ties, members, nan_stays

ROW = Row("decode_all_rows", tile=Tile(outputs=32, step=16, warps=2, stages=2, gate_rows=16, gate_step=32))
"""A row with steps so short that 72 columns are several."""


@pytest.mark.parametrize(
    ("ranks", "widths", "top_k", "tokens"),
    [
        pytest.param(RANKS, (24, 9, 33), 2, 5, id="mixed"),
        pytest.param((2,) * 40, (24, 9), 3, 1, id="40x2-top3"),
        pytest.param((0, 0, 0), (24,), 2, 1, id="no-rows"),
        pytest.param((64, 3), (33,), 1, 16, id="rank-64", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(ranks: tuple[int, ...], widths: tuple[int, ...], top_k: int, tokens: int) -> None:
    """Rows and outputs do not fill a block, there are a bias and a mask, and two runs are bit-equal."""
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if tokens == 5 else None
    check_equals_reference(members(widths, tokens, ranks=ranks, bias=tokens == 5), ROW, Routing(top_k, 1.5, allowed))


def test_rounds_once() -> None:
    check_rounded_once(members((40, 24), 16, dtype=torch.float16), ROW, most=1.15)


def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    check_ties(members((24,), 6, dtype=torch.float16), ROW)


def test_nan_stays_in_its_token_and_in_its_adapter() -> None:
    nan_stays(members((24, 9), 5), ROW)


def test_reads_rows_with_gaps() -> None:
    """The rows of the weights may have gaps, which may hold B^T."""
    check_equals_reference(members((24, 9, 33), 3, bias=True, gap=24), ROW)
    check_equals_reference(members((24, 9, 33), 3, bias=True, has_up=True), ROW, in_place=True)
