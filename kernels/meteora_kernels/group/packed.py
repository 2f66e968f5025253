"""One product with base weights, gates and A; then B is added to the base's columns."""

from __future__ import annotations

from torch import Tensor

from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.steps.products import products_by
from meteora_kernels.steps.up import up
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
        row: Row of the table, with ``pieces`` and ``tile`` of the product (:func:`meteora_kernels.steps.products.products_by`). With ``inline``, every
            program of the pass over the output routes its tokens itself; otherwise a separate launch does so before it. With the way "invariant", the
            pass over the output has the tile's number of tokens per program, too.
        form: Ignored by this path.
    """
    adapters, outputs = group.adapters, sum(group.adapters.widths)
    y = x.new_empty(x.shape[0], outputs)
    whole = products_by(row, x, group.packed)
    found, base = whole[..., outputs:], whole[..., :outputs]
    if group.bias is not None:
        (base[0] if base.dim() == 3 else base).add_(group.bias)
    down = found[..., group.gate_rows :]
    if row.inline:
        block = row.tile.tokens if row.way == "invariant" and row.tile is not None else None
        up(down, adapters, base, y, logits=found, routing=routing, block_tokens=block)
    else:
        up(middle(found, down, adapters, routing, max_rank=adapters.max_rank or 0, dtype=x.dtype), adapters, base, y)
    return y
