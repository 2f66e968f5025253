"""Gates and A, B, then the base added to it, against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, TILE, check_equals_reference, check_rounded_once, errors, members, nan_stays, ties


@pytest.mark.parametrize(("widths", "tokens", "bias"), [((24, 9, 33), 1, False), ((24, 9), 18, True), pytest.param((24,), 70, False, marks=pytest.mark.slow)])
def test_equals_its_members(widths: tuple[int, ...], tokens: int, bias: bool) -> None:
    check_equals_reference(members(widths, tokens, bias=bias, hidden=20), Row("split"))


@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(("widths", "tokens"), [((24, 9), 17), pytest.param((40,), 67, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row("split", pieces=3), id="library-3"),
        pytest.param(Row("split", pieces=1, tile=TILE), id="kernel-1"),
        pytest.param(Row("split", pieces=3, tile=TILE), id="kernel-3"),
        pytest.param(Row("split", pieces=1, way="beside"), id="beside"),
    ],
)
def test_partial_sums(row: Row, widths: tuple[int, ...], tokens: int, masked: bool) -> None:
    """In float16, against float64: every token has the same route, and the output is rounded twice."""
    given = members(widths, tokens, bias=masked, dtype=torch.float16)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    check_rounded_once(given, row, Routing(allowed=allowed), most=3)


def test_nan_stays_in_its_token() -> None:
    nan_stays(members((24, 9), 20, dtype=torch.float16), Row("split", pieces=1), in_adapter=False)


@pytest.mark.parametrize("tile", [None, TILE], ids=["library", "kernel"])
def test_logits_are_not_rounded_in_pieces(tile: Tile | None) -> None:
    """Two logits that are equal in float16: the larger wins with partial sums, the first adapter without."""
    given = ties(members((24,), 18, dtype=torch.float16))
    exact = given.exact(Routing(1))
    assert float(errors(given.run(Row("split", pieces=2, tile=tile), Routing(1)), exact).max()) < 0.005
    assert float(errors(given.run(Row("split"), Routing(1)), exact).max()) > 0.05
