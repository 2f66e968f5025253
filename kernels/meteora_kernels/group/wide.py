"""Gates and A, then base and B in one library product for each window (:mod:`meteora_kernels.wide`); the output is rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.group import wide_before
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import Out, middle
from meteora_kernels.steps.products import library_products, products, products_by, right_of
from meteora_kernels.types import Group, Routing


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    if not case.facts.wide:
        return "the group does not keep B^T in the rows of its weights"
    return wide_before.can_run(case, row) if row.gate_pieces else None


def run(x: Tensor, group: Group, routing: Routing, row: Row, *, in_place: bool = False) -> Tensor:
    """Outputs of a group of linears, base and adapters together: (M, O), in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears, with ``wide``.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table. With ``gate_pieces``, one launch does everything before the product (:mod:`wide_before`); otherwise ``pieces`` and ``tile``
            describe the product with gates and A, which also copies x if there is a tile.
        in_place: Whether x is a window of the buffer already, so that it is not copied.
    """
    wide, adapters = group.wide, group.adapters
    assert wide is not None
    rows = x if in_place else wide.new_rows(x.shape[0], x)
    out = Out(wide.whole(rows), *wide.places, wide.pad)
    if row.gate_pieces:
        wide_before.run(x, group, routing, row, out, None if in_place else rows)
    else:
        copied = not in_place and row.tile is not None
        if copied and row.tile is not None:
            found = products(x, adapters.gate, row.pieces, row.tile, rows)
        elif row.tile is None and row.pieces:
            found = library_products(x, adapters.gate, row.pieces, right(group, row.pieces))
        else:
            found = products_by(row, x, adapters.gate)
        middle(found, found[..., group.gate_rows :], adapters, routing, max_rank=adapters.max_rank or 0, out=out)
        if not in_place and not copied:
            rows.copy_(x)
    tokens, outputs = x.shape[0], group.weights.shape[0]
    y = x.new_empty(tokens, outputs)
    for begin, weights, start in windows(group):
        left = out.rows.as_strided((tokens, weights.shape[0]), (wide.row, 1), out.rows.storage_offset() + begin)
        torch.mm(left, weights, out=y.as_strided((tokens, weights.shape[1]), (outputs, 1), start))
    return y if group.bias is None else y.add_(group.bias)


def right(group: Group, pieces: int) -> Tensor:
    """The right operand of the product with gates and A, which the group keeps."""
    found = group.views.get(pieces)
    if found is None:
        found = group.views[pieces] = right_of(group.adapters.gate, pieces)
    assert isinstance(found, Tensor)
    return found


def windows(group: Group) -> list[tuple[int, Tensor, int]]:
    """The products of base and B, which the group keeps: first column in the buffer, transposed weights (columns, o), first column of the output."""
    found: list[tuple[int, Tensor, int]] | None = group.views.get("windows")
    if found is None:
        assert group.wide is not None
        pairs = group.wide.windows(group.packed, list(group.adapters.widths))
        found = group.views["windows"] = [(columns.start, weights.t(), place.start) for columns, weights, place in pairs]
    return found
