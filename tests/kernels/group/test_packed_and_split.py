"""The two paths that the library mostly computes, with and without float32 partial sums; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.group import Block, group_operator, row_for, run_group
from meteora_kernels.plan import Row
from meteora_kernels.stacked import stacked_rows_of
from meteora_kernels.steps import products as products_module
from meteora_kernels.steps.products import library_products, products
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, RANKS, TILE, check_rounded_once, errors, members
from support.kernel_rows import taking


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("widths", [pytest.param((24,), marks=pytest.mark.slow), pytest.param((24, 9), marks=pytest.mark.slow), (24, 9, 33)])
def test_group_equals_its_members(widths: tuple[int, ...], tokens: int, bias: bool) -> None:
    given = members(widths, tokens, bias=bias, hidden=20)
    expected = given.exact().float()
    for row in (Row("packed"), Row("packed", inline=True), Row("split")):
        torch.testing.assert_close(given.run(row), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(("widths", "tokens"), [((24, 9, 33), 21), pytest.param((40,), 67, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row("packed", pieces=1, inline=True), id="packed-library-1"),
        pytest.param(Row("packed", pieces=3, inline=True), id="packed-library-3"),
        pytest.param(Row("packed", pieces=1, tile=TILE, inline=True), id="packed-kernel-1"),
        pytest.param(Row("packed", pieces=3, tile=TILE, inline=True), id="packed-kernel-3"),
        pytest.param(Row("packed", pieces=3, tile=TILE), id="packed-routed-before"),
        pytest.param(Row("split", pieces=3), id="split-library-3"),
        pytest.param(Row("split", pieces=1, tile=TILE), id="split-kernel-1"),
        pytest.param(Row("split", pieces=3, tile=TILE), id="split-kernel-3"),
    ],
)
def test_partial_sums_in_every_order(row: Row, widths: tuple[int, ...], tokens: int, masked: bool) -> None:
    """In float16, against float64: no token is routed elsewhere, and "packed" is off by little more than one rounding of the output."""
    given = members(widths, tokens, bias=masked, dtype=torch.float16)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    check_rounded_once(given, row, Routing(allowed=allowed), most=1.15 if row.path == "packed" else 3)


@pytest.mark.parametrize("path", ["packed", "split"])
@pytest.mark.parametrize("tile", [None, TILE], ids=["library", "kernel"])
def test_logits_are_not_rounded(path: str, tile: Tile | None) -> None:
    """Two logits that are one number in float16: the larger wins with partial sums, the first adapter without."""
    given = members((24,), 18, dtype=torch.float16)
    case = given.cases[0]
    case.x[:, :2] = 1.0
    case.gate[:] = 0.0
    case.gate[[0, 4], 0] = 4.0
    case.gate[4, 1] = 2.0**-10
    given = given.again()
    expected = given.exact(Routing(1))

    def far(pieces: int) -> float:
        return float(errors(given.run(Row(path, pieces=pieces, tile=tile if pieces else None), Routing(1)), expected).max())

    assert far(1) < 0.005
    assert far(2) < 0.005
    assert far(0) > 0.05


def test_rows_say_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel with its tile, the library's pieces, or one product in the model's dtype; all rows of the block only where the path is "packed"."""
    given, called = members((24,), 17, dtype=torch.float16), []
    monkeypatch.setattr(products_module, "products", lambda x, rows, *cut: [called.append((len(rows), *cut)), products(x, rows, *cut)][1])
    monkeypatch.setattr(products_module, "library_products", lambda x, rows, cut: [called.append((len(rows), cut)), library_products(x, rows, cut)][1])
    for path in ("packed", "split"):
        for pieces, tile in ((0, None), (3, None), (2, TILE)):
            given.run(Row(path, pieces=pieces, tile=tile))
    few, every = stacked_rows_of(len(RANKS), sum(RANKS)), len(given.group.packed)
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
def test_group_operator_is_sound_for_compilers(pieces: int) -> None:
    given = members((24, 9), 17, bias=True, dtype=torch.float16)
    group = given.group
    _, _, up, scaling, offsets, max_rank, widths, _ = group.adapters
    block = Block(group.packed, up, scaling, offsets, group.bias, widths, max_rank or 0)
    flat = group_operator.flat((given.x, block, group.flags, Routing()))
    with taking(Row("packed", pieces=pieces)):
        found = torch.library.opcheck(group_operator.op, flat, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


def test_compiled_groups_are_whole_graphs() -> None:
    """And do not read B^T in the rows of the weights, which may be stale there."""
    given = members((24, 9), 20, dtype=torch.float16, has_up=True)
    given.wide.place_up(given.group.packed, torch.zeros_like(given.group.adapters.lora_B), list(given.widths))
    compiled = torch.compile(lambda x: run_group(x, given.group, Routing()), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), taking(Row("wide"), Row("split", pieces=1)):
        assert row_for(given.group, 20, 2).path == "wide"
        assert float(errors(compiled(given.x), given.exact()).max()) < 5e-3
