"""Adapters on top of a finished base output, for large ranks: the products with G, A and B by the library, and the routing between them."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.operators import operator
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.types import Adapters, Routing

ANY_ROW = Row("library")


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    return None if case.plain else "the path is for inference with the gate's own routes, and adapters that see what the gate sees"


def before(x: Tensor, adapters: Adapters, routing: Routing, row: Row) -> tuple[Tensor, Tensor]:
    """The gate logits (M, N), and ``A x`` scaled by the route of its token and 0 for rows that the token did not choose (M, R).

    Args:
        x: Input (M, h), contiguous, M >= 1.
        adapters: The adapters of the layer, as contiguous tensors.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table, of which nothing is read.
    """
    logits, down = torch.mm(x, adapters.gate.t()), torch.mm(x, adapters.lora_A.t())
    return logits, middle(logits, down, adapters, routing, max_rank=adapters.max_rank or 0)


def after(begun: tuple[Tensor, Tensor], base: Tensor, adapters: Adapters, routing: Routing, row: Row) -> Tensor:
    """Add the adapters to a base output (M, o), columns contiguous: (M, o), contiguous. ``begun`` is the result of :func:`before`.

    The base output is overwritten if it has the dtype of the adapters: otherwise, the library would copy it before it adds the product.
    """
    found = begun[1]
    if base.dtype == found.dtype and base.is_contiguous():
        return base.addmm_(found, adapters.lora_B)
    return _sum(base, found, adapters)


def _sum(base: Tensor, found: Tensor, adapters: Adapters) -> Tensor:
    if base.dtype == found.dtype:
        return torch.addmm(base, found, adapters.lora_B)
    return base + torch.mm(found, adapters.lora_B)


def run(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """The output (M, o), contiguous, and the logits (M, N); arguments as in :func:`before` and :func:`after`, but the base output is only read."""
    logits, found = before(x, adapters, routing, ANY_ROW)
    return _sum(base, found, adapters), logits


def out_like(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :data:`library`."""
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], adapters.gate.shape[0]))


library = operator("library", out_like)(run)
