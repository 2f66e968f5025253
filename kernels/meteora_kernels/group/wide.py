"""Gates and A, then base and B in one library product for each window (:mod:`meteora_kernels.wide`); the output is rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.group import wide_before
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import Out, middle
from meteora_kernels.steps.products import products, products_by
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
        found = products(x, adapters.gate, row.pieces, row.tile, rows) if copied and row.tile is not None else products_by(row, x, adapters.gate)
        middle(found, found[..., group.gate_rows :], adapters, routing, max_rank=adapters.max_rank or 0, out=out)
        if not in_place and not copied:
            rows.copy_(x)
    y = x.new_empty(x.shape[0], sum(adapters.widths))
    for columns, weights, place in wide.windows(group.packed, list(adapters.widths)):
        torch.mm(out.rows[:, columns], weights.t(), out=y[:, place])
    return y if group.bias is None else y.add_(group.bias)
