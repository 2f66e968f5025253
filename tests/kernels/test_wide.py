"""B as an extension of K: the layout itself, and groups that run so, against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meteora_kernels import plan
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.triton_chosen import decode_chosen
from meteora_kernels.triton_decode import decode
from meteora_kernels.triton_group import group_forward, group_op
from meteora_kernels.wide import Wide
from support.kernel_groups import DEVICE, RANKS, TILE, laid, members, use, widened


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 64, 224])
def test_windows_hold_weights_and_b_side_by_side(members: int, rank: int) -> None:
    """Filled with random numbers, every window times ``[x, h]`` is ``W x + B^T h``, and the rows of the block are still what they were."""
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
    ("pieces", "tile", "gate_pieces"),
    [(0, None, 0), (2, None, 0), (3, TILE, 0), (0, (16, 32, 16, 4, 2), 3), pytest.param(0, (32, 64, 16, 4, 2), 1, marks=pytest.mark.slow)],
    ids=["rounded", "library-2", "kernel-3", "one-launch-3", "one-launch-1"],
)
@pytest.mark.parametrize(
    ("widths", "tokens"), [((24, 9, 33), 21), pytest.param((24, 9), 67, marks=pytest.mark.slow), pytest.param((40,), 18, marks=pytest.mark.slow)]
)
def test_wide_groups_round_once(
    widths: tuple[int, ...],
    tokens: int,
    pieces: int,
    tile: tuple[int, int, int, int, int] | None,
    gate_pieces: int,
    masked: bool,
    in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16, against float64: the error is that of one rounding of the output, and what lay around x does not matter."""
    group, wide = widened(members(widths, tokens, masked, torch.float16))
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    expected = group.exact(allowed=allowed)
    use(monkeypatch, "wide", pieces, tile, gate_pieces)
    x, *others = group.arguments(allowed=allowed)
    outputs = []
    for _ in range(2):
        rows = laid(group.x, wide) if in_place else group.x
        outputs.append(group_forward(rows, *others, beside=True, in_place=in_place))  # type: ignore[arg-type]
        assert torch.equal(rows, x)  # type: ignore[arg-type]
    assert torch.equal(*outputs)
    assert (outputs[0].dtype, outputs[0].shape) == (torch.float16, (tokens, sum(widths)))

    def errors(got: Tensor) -> Tensor:
        return (got.double() - expected).norm(dim=1) / expected.norm(dim=1)

    own = errors(expected.half())
    assert int(group.flags.abs().sum()) == 0
    if pieces or gate_pieces:
        assert float(errors(outputs[0]).max()) <= 3 * float(own.max())
    # Rounded logits may send a near tie elsewhere; PyTorch before 2.13 rounds before it adds a bias on some ways.
    assert float(errors(outputs[0]).median()) <= (1.6 if masked else 1.2) * float(own.median())


def test_wide_rows_serve_every_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding (all of A, and the chosen rows), "packed" and "split" read the same block, whose rows are further apart than h."""
    for tokens in (3, 21):
        group, wide = widened(members((24, 9, 33), tokens, True, torch.float32))
        expected = group.exact().float()
        x = laid(group.x, wide)
        for order in ("packed", "split", "wide"):
            use(monkeypatch, order)
            _, *others = group.arguments()
            torch.testing.assert_close(group_forward(x, *others, beside=True, in_place=True), expected, rtol=2e-4, atol=2e-4)  # type: ignore[arg-type]
        if tokens == 3:
            weight, ga = group.packed[:66], group.packed[66:-5]
            case, sizes = group.cases[0], (sum(RANKS), gate_rows_of(len(RANKS)), max(RANKS), 2, 1.0)
            for run in (decode, decode_chosen):
                got = run(group.x, weight, ga, group.up, group.bias, case.scaling, case.offsets, group.flags, group.widths, *sizes)
                torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_only_who_says_that_b_lies_beside_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale columns are not read without ``beside``, nor by compilers, and are with it; a plan line in place only waits for such an x."""
    group, wide = widened(members((24, 9), 20, False, torch.float16))
    wide.place_up(group.packed, torch.zeros_like(group.up), list(group.widths))
    expected = group.exact()
    lines = (plan.GroupRule("wide", 17, plan.EVER, in_place=True), plan.GroupRule("split", 17, plan.EVER))
    monkeypatch.setattr(plan, "GROUPS", lines)
    x, *others = group.arguments()

    def far(output: Tensor) -> bool:
        return float(((output.double() - expected).norm(dim=1) / expected.norm(dim=1)).median()) > 0.02

    assert not far(group_forward(x, *others))  # type: ignore[arg-type]
    assert not far(group_op(x, *others))
    assert not far(group_forward(x, *others, beside=True))  # type: ignore[arg-type]
    assert far(group_forward(laid(group.x, wide), *others, beside=True, in_place=True))  # type: ignore[arg-type]


def test_only_small_ranks_in_16_bits_lie_beside() -> None:
    assert plan.lies_beside(4096, 224, 3, torch.bfloat16)
    assert plan.lies_beside(4096, 224, 1, torch.float16)
    assert not plan.lies_beside(4096, 224, 3, torch.float32)
    assert not plan.lies_beside(4096, 2048, 1, torch.bfloat16)
    assert not plan.lies_beside(4096, 260, 3, torch.bfloat16)
    assert not plan.lies_beside(576, 224, 2, torch.bfloat16)
