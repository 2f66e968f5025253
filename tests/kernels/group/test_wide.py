"""B as further input columns of the base weights: the layout, and groups with it, against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.group import reads_in_place, run_group
from meteora_kernels.group.wide import copy_rows
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from meteora_kernels.wide import Wide
from support.kernel_groups import DEVICE, TILE, check_rounded_once, errors, laid, members
from support.kernel_rows import taking


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 64, 224])
def test_windows_hold_weights_and_b_side_by_side(members: int, rank: int) -> None:
    """With random numbers, every window times ``[x, h]`` is ``W x + B^T h``, and the rows of the block do not change."""
    torch.manual_seed(0)
    wide, widths = Wide(20, rank, members), [7, 5, 3][:members]
    assert wide.pad % 64 == 0
    assert 0 <= wide.pad - rank < 64
    weights = torch.randn(sum(widths) + 4, 20, dtype=torch.float64)
    up = [torch.randn(rank, width, dtype=torch.float64) for width in widths]
    packed = wide.new_block(len(weights), weights)
    packed.copy_(weights)
    wide.place_up(packed, torch.cat([part.reshape(-1) for part in up]), widths)
    assert torch.equal(packed, weights)
    x = wide.new_rows(6, weights)
    buffer = wide.whole(x)
    assert buffer.data_ptr() == x.data_ptr() - 8 * wide.left
    buffer.copy_(torch.randn(buffer.shape, dtype=torch.float64))
    columns = [wide.places[0], *(wide.places[1] + index * wide.pad for index in range(members - 1))]
    inner = [buffer[:, column : column + rank] for column in columns]
    expected = torch.cat([x @ weight.t() + h @ b for weight, h, b in zip(weights.split([*widths, 4]), inner, up, strict=False)], dim=1)
    found = torch.full_like(expected, float("nan"))
    for inside, rows, place in wide.windows(packed, widths):
        torch.mm(buffer[:, inside], rows.t(), out=found[:, place])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in-place"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row("wide"), id="rounded"),
        pytest.param(Row("wide", pieces=2), id="library-2"),
        pytest.param(Row("wide", pieces=3, tile=TILE), id="kernel-3"),
        pytest.param(Row("wide", gate_pieces=3, tile=TILE), id="one-launch-3"),
        pytest.param(Row("wide", gate_pieces=1, tile=Tile(32, 64, 16, 4, 2)), id="one-launch-1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("widths", "tokens"), [((24, 9, 33), 21), pytest.param((24, 9), 67, marks=pytest.mark.slow), pytest.param((40,), 18, marks=pytest.mark.slow)]
)
def test_wide_groups_round_once(widths: tuple[int, ...], tokens: int, row: Row, masked: bool, in_place: bool) -> None:
    """In float16, against float64: the error is that of one rounding of the output, for any values around x."""
    given = members(widths, tokens, bias=masked, dtype=torch.float16, has_up=True)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    if row.pieces or row.gate_pieces:
        # On some paths, PyTorch before 2.13 rounds before it adds a bias.
        check_rounded_once(given, row, Routing(allowed=allowed), in_place=in_place, most=1.6 if masked else 1.2)
        return
    exact = given.exact(Routing(allowed=allowed))
    found = given.run(row, Routing(allowed=allowed), in_place=in_place)
    assert float(errors(found, exact).median()) <= 1.6 * float(errors(exact.half(), exact).median())  # rounded logits may decide a near tie differently


@pytest.mark.parametrize("row", [Row("packed"), Row("split"), Row("wide")], ids=["packed", "split", "wide"])
def test_wide_rows_serve_every_other_path(row: Row) -> None:
    """Other paths read the same block, whose row stride is larger than h, and x in its buffer."""
    given = members((24, 9, 33), 21, bias=True, has_up=True)
    torch.testing.assert_close(given.run(row, in_place=True), given.exact().float(), rtol=2e-4, atol=2e-4)


def test_only_groups_that_keep_b_in_the_rows_read_it_there() -> None:
    """Only groups with ``has_up`` read the columns of B^T, and a row with ``in_place`` is used only for x in such a buffer."""
    given = members((24, 9), 20, dtype=torch.float16, has_up=True)
    given.wide.place_up(given.group.packed, torch.zeros_like(given.group.adapters.lora_B), list(given.widths))
    plain = members((24, 9), 20, dtype=torch.float16)

    def far(output: torch.Tensor) -> bool:
        return float(errors(output, given.exact()).median()) > 0.02

    with taking(Row("wide", in_place=True), Row("split")):
        assert reads_in_place(given.group, 20, 2)
        assert not reads_in_place(plain.group, 20, 2)
        assert not far(run_group(plain.x, plain.group, Routing()))
        assert not far(run_group(given.x, given.group, Routing()))
        assert far(run_group(laid(given.x, given.wide), given.group, Routing(), in_place=True))


def test_only_small_ranks_in_16_bits_are_kept_in_the_rows() -> None:
    assert Wide(4096, 224, 3).pays(torch.bfloat16)
    assert Wide(4096, 224, 1).pays(torch.float16)
    assert not Wide(4096, 224, 3).pays(torch.float32)
    assert not Wide(4096, 2048, 1).pays(torch.bfloat16)
    assert not Wide(4096, 260, 3).pays(torch.bfloat16)
    assert not Wide(576, 224, 2).pays(torch.bfloat16)


@pytest.mark.parametrize(("shape", "hidden", "gap"), [((5,), 64, 64), ((2, 3), 24, 8), ((5,), 20, 8), ((5,), 24, 3)])
def test_rows_are_copied_whether_or_not_they_are_aligned_to_16_bytes(shape: tuple[int, ...], hidden: int, gap: int) -> None:
    source = torch.randn(*shape, hidden).half()
    source[(0,) * len(shape)] = torch.tensor(float("nan"))
    buffer = torch.zeros(*shape, gap + hidden, dtype=torch.half)
    copy_rows(source, buffer[..., gap:])
    assert torch.equal(buffer[..., gap:].view(torch.int16), source.view(torch.int16))
    assert not buffer[..., :gap].any()
