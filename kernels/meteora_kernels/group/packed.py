"""One product over base weights, gates and A; then B on top of the base's columns."""

from __future__ import annotations

from torch import Tensor

from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.steps.products import products_by
from meteora_kernels.steps.up import up
from meteora_kernels.types import Group, Routing


def can_run(case: Case, row: Row) -> str | None:
    """This path takes every case."""
    return None


def run(x: Tensor, group: Group, routing: Routing, row: Row, *, in_place: bool = False) -> Tensor:
    """Base and adapters of a group of linears: (M, O), contiguous, the dtype of x.

    Args:
        x: (M, h), columns contiguous.
        group: The linears.
        routing: k, T and ``allowed``.
        row: ``pieces`` and ``tile`` of the product (:func:`meteora_kernels.steps.products.products_by`); ``inline``: every program of the pass over
            the output routes its tokens itself, instead of one launch before it.
        in_place: Not used here.
    """
    adapters, outputs = group.adapters, sum(group.adapters.widths)
    y = x.new_empty(x.shape[0], outputs)
    whole = products_by(row, x, group.packed)
    found, base = whole[..., outputs:], whole[..., :outputs]
    if group.bias is not None:
        (base[0] if base.dim() == 3 else base).add_(group.bias)
    down = found[..., group.gate_rows :]
    if row.inline:
        up(down, adapters, base, y, logits=found, routing=routing)
    else:
        up(middle(found, down, adapters, routing, max_rank=adapters.max_rank or 0, dtype=x.dtype), adapters, base, y)
    return y
