"""Products with rows of a block as float32 partial sums; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.plan import Row
from meteora_kernels.steps import products as module
from meteora_kernels.steps.products import library_products, products, products_by
from support.kernel_groups import DEVICE, TILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "splits", "lengths"),
    [(37, 50, 72, 3, (32, 32, 8)), (16, 64, 64, 2, (32, 32)), (1, 5, 20, 8, (16, 4)), (70, 96, 40, 1, (40,)), (33, 7, 64, 2, (32, 32))],
)
def test_products_are_partial_sums(tokens: int, rows: int, hidden: int, splits: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every piece is the product of its columns, also with tiles that extend past the end, shorter pieces and inputs with gaps between rows."""
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


def test_rows_say_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row selects the kernel with its tile, pieces of the library, or one product in the model's dtype."""
    x, rows, called = torch.randn(3, 48).to(DEVICE, torch.float16), torch.randn(5, 48).to(DEVICE, torch.float16), []
    monkeypatch.setattr(module, "products", lambda *arguments: called.append(arguments[2:]))
    monkeypatch.setattr(module, "library_products", lambda *arguments: called.append(arguments[2:]))
    for row in (Row("packed"), Row("packed", pieces=3), Row("split", pieces=2, tile=TILE)):
        products_by(row, x, rows)
    assert called == [(3,), (2, TILE)]
    torch.testing.assert_close(products_by(Row("packed"), x, rows), x @ rows.t())
