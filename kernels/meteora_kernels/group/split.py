"""A product with gates and A, then B into the output, then the base's product added to it; the output is rounded twice."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.steps.products import products_by
from meteora_kernels.types import WHOLE, Form, Group, Routing


def can_run(case: Case, row: Row) -> str | None:
    """None: this path can run every case."""
    return None


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears, base and adapters together: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table, with ``pieces`` and ``tile`` of the product with gates and A (:func:`meteora_kernels.steps.products.products_by`).
        form: Ignored by this path.
    """
    adapters, rank = group.adapters, group.total_rank
    y = x.new_empty(x.shape[0], sum(adapters.widths))
    products = products_by(row, x, adapters.gate)
    found = middle(products, products[..., group.gate_rows :], adapters, routing, max_rank=adapters.max_rank or 0, dtype=x.dtype)
    start = 0
    for member, width in enumerate(adapters.widths):
        up = adapters.lora_B.view(-1)[rank * start : rank * (start + width)].view(rank, width)
        torch.mm(found[:, member * rank : (member + 1) * rank], up, out=y[:, start : start + width])
        start += width
    y.addmm_(x, group.weights.t())
    return y if group.bias is None else y.add_(group.bias)
