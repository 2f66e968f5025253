"""Fused groups against the reference: every order, with and without float32 partial sums; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meteora_kernels import plan, triton_group
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.triton_chosen import decode_chosen
from meteora_kernels.triton_decode import decode
from meteora_kernels.triton_group import group_forward, group_op
from meteora_kernels.triton_products import library_products, products
from support.kernel_groups import DEVICE, RANKS, SPARE, TILE, members, use


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 20, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("widths", [pytest.param((24,), marks=pytest.mark.slow), pytest.param((24, 9), marks=pytest.mark.slow), (24, 9, 33)])
def test_group_equals_its_members(widths: tuple[int, ...], tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = members(widths, tokens, bias, torch.float32, hidden=20)
    expected = group.exact().float()
    for order in ("packed", "split"):
        use(monkeypatch, order)
        torch.testing.assert_close(group_forward(*group.arguments()), expected, rtol=2e-4, atol=2e-4)  # type: ignore[arg-type]
    assert int(group.flags.sum()) == 0
    if tokens <= 16:
        weight, ga = group.packed[: sum(widths)], group.packed[sum(widths) : -SPARE]
        case, sizes = group.cases[0], (sum(RANKS), gate_rows_of(len(RANKS)), max(RANKS), 2, 1.0)
        for run in (decode, decode_chosen):
            got = run(group.x, weight, ga, group.up, group.bias, case.scaling, case.offsets, group.flags, widths, *sizes)
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
            assert int(group.flags.sum()) == 0


@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(("widths", "tokens"), [((24, 9, 33), 21), pytest.param((40,), 67, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("order", "pieces", "tile", "inline"),
    [
        pytest.param("packed", 1, None, 1024, id="packed-library-1"),
        pytest.param("packed", 3, None, 1024, id="packed-library-3"),
        pytest.param("packed", 1, TILE, 1024, id="packed-kernel-1"),
        pytest.param("packed", 3, TILE, 1024, id="packed-kernel-3"),
        pytest.param("packed", 3, TILE, 16, id="packed-routed-before"),
        pytest.param("split", 3, None, 16, id="split-library-3"),
        pytest.param("split", 1, TILE, 16, id="split-kernel-1"),
        pytest.param("split", 3, TILE, 16, id="split-kernel-3"),
    ],
)
def test_partial_sums_in_every_order(
    order: str,
    pieces: int,
    tile: tuple[int, int, int, int, int] | None,
    inline: int,
    widths: tuple[int, ...],
    tokens: int,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16, against float64: no token is routed elsewhere, "packed" is off by little more than one rounding of the output."""
    group = members(widths, tokens, masked, torch.float16)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    expected = group.exact(allowed=allowed)
    use(monkeypatch, order, pieces, tile)
    monkeypatch.setattr(plan, "INLINE_TOKENS", inline)
    output = group_forward(*group.arguments(allowed=allowed))  # type: ignore[arg-type]
    assert (output.dtype, output.shape) == (torch.float16, (tokens, sum(widths)))

    def errors(got: Tensor) -> Tensor:
        return (got.double() - expected).norm(dim=1) / expected.norm(dim=1)

    own = errors(expected.half())
    assert float(errors(output).max()) <= 3 * float(own.max())
    if order == "packed":
        assert float(errors(output).median()) <= 1.15 * float(own.median())
    assert torch.equal(group_forward(*group.arguments(allowed=allowed)), output)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["packed", "split"])
@pytest.mark.parametrize("tile", [None, TILE], ids=["library", "kernel"])
def test_logits_are_not_rounded(order: str, tile: tuple[int, int, int, int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two logits that are one number in float16: the larger wins with partial sums, the first adapter without."""
    group = members((24,), 18, False, torch.float16)
    case = group.cases[0]
    case.x[:, :2] = 1.0
    case.gate[:] = 0.0
    case.gate[[0, 4], 0] = 4.0
    case.gate[4, 1] = 2.0**-10
    group.packed[24 : 24 + len(RANKS)] = case.gate
    expected = group.exact(top_k=1)

    def far(pieces: int) -> float:
        use(monkeypatch, order, pieces, tile if pieces else None)
        output = group_forward(*group.arguments(top_k=1))  # type: ignore[arg-type]
        return float(((output.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())

    assert far(1) < 0.005
    assert far(2) < 0.005
    assert far(0) > 0.05


def test_group_asks_the_plan_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And decoding does not ask."""
    asked = []

    def rule(*case: object, can_run: object, **state: bool) -> plan.GroupRule:
        asked.append((*case, state))
        raise LookupError

    monkeypatch.setattr(plan, "group_rule", rule)
    with pytest.raises(LookupError):
        group_forward(*members((24, 9), 17, False, torch.float16).arguments())  # type: ignore[arg-type]
    assert asked == [(17, 33, 72, torch.float16, {"beside": False, "in_place": False})]
    group_forward(*members((24, 9), 16, False, torch.float16).arguments())  # type: ignore[arg-type]
    assert len(asked) == 1


def test_line_says_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel with its tile, the library's pieces, or one product in the model's dtype; of all rows only where the order is "packed"."""
    group, called = members((24,), 17, False, torch.float16), []
    monkeypatch.setattr(triton_group, "products", lambda x, rows, splits, tile: [called.append((len(rows), splits, tile)), products(x, rows, splits, tile)][1])
    monkeypatch.setattr(triton_group, "library_products", lambda x, rows, splits: [called.append((len(rows), splits)), library_products(x, rows, splits)][1])
    for order in ("packed", "split"):
        for pieces, tile in ((0, None), (3, None), (2, TILE)):
            use(monkeypatch, order, pieces, tile)
            group_forward(*group.arguments())  # type: ignore[arg-type]
    few = stacked_rows_of(len(RANKS), sum(RANKS))
    every = len(group.packed)
    assert called == [(every, 3), (every, 2, TILE), (few, 3), (few, 2, TILE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "splits", "lengths"),
    [(37, 50, 72, 3, (32, 32, 8)), (16, 64, 64, 2, (32, 32)), (1, 5, 20, 8, (16, 4)), (70, 96, 40, 1, (40,)), (33, 7, 64, 2, (32, 32))],
)
def test_products_are_partial_sums(tokens: int, rows: int, hidden: int, splits: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tiles that stick out on every side, pieces cut short, inputs with gaps between rows; every piece is the product of its columns."""
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(count, hidden + 3, generator=generator).to(DEVICE, dtype)[:, :hidden] for count in (tokens, rows))
    exact = [left @ right.t() for left, right in zip(x.double().split(lengths, dim=1), weights.double().split(lengths, dim=1), strict=True)]
    found = products(x, weights, splits, TILE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(exact).float(), rtol=1e-5, atol=2e-5)
    copied = torch.full((tokens, hidden + 9), float("nan"), dtype=dtype, device=DEVICE)
    assert torch.equal(products(x, weights, splits, TILE, copied[:, 4 : hidden + 4]), found)
    assert torch.equal(copied[:, 4 : hidden + 4], x)
    assert bool(copied[:, [0, 3, hidden + 4, hidden + 8]].isnan().all())
    found = library_products(x, weights, splits)
    equal = hidden % (8 * splits) == 0
    assert (found.dtype, found.shape) == (torch.float32, (splits if equal else 1, tokens, rows))
    torch.testing.assert_close(found.sum(0), sum(exact).float(), rtol=1e-5, atol=2e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("pieces", [0, 2])
def test_group_operator_is_sound_for_compilers(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "packed", pieces)
    group = members((24, 9), 17, True, torch.float16)
    found = torch.library.opcheck(group_op, group.arguments(), test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}
