"""A product with gates and A, then B into the output, then the base's product added to it; or the base's product first, and B added to it. The output is
rounded twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.steps.products import products_by
from meteora_kernels.steps.second_stream import on_second_stream
from meteora_kernels.steps.up import up
from meteora_kernels.types import WHOLE, Form, Group, Routing


def can_run(case: Case, row: Row) -> str | None:
    """None: this path can run every case."""
    return None


def middle_of(x: Tensor, group: Group, routing: Routing, row: Row) -> Tensor:
    """``A x`` of all members (M, members * R), scaled by the route of its token; arguments as in :func:`run`."""
    products, adapters = products_by(row, x, group.adapters.gate), group.adapters
    return middle(products, products[..., group.gate_rows :], adapters, routing, max_rank=adapters.max_rank or 0, dtype=x.dtype)


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears, base and adapters together: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table, with ``pieces`` and ``tile`` of the product with gates and A (:func:`meteora_kernels.steps.products.products_by`). With the way
            "beside", the base's product comes first, and in a CUDA graph the work of the adapters before B runs at the same time.
        form: Ignored by this path.
    """
    adapters, rank = group.adapters, group.total_rank
    if row.way == "beside":
        with on_second_stream(x) as join:
            found = middle_of(x, group, routing, row)
        y = F.linear(x, group.weights, group.bias)
        join()
        up(found, adapters, y, y)
        return y
    y = x.new_empty(x.shape[0], sum(adapters.widths))
    found = middle_of(x, group, routing, row)
    start = 0
    for member, width in enumerate(adapters.widths):
        lora_B = adapters.lora_B.view(-1)[rank * start : rank * (start + width)].view(rank, width)
        torch.mm(found[:, member * rank : (member + 1) * rank], lora_B, out=y[:, start : start + width])
        start += width
    y.addmm_(x, group.weights.t())
    return y if group.bias is None else y.add_(group.bias)
