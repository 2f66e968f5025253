"""Adapters on top of a finished base output, for large ranks: the products with G, A and B by the library, and the routing between them."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.operators import operator
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import middle
from meteora_kernels.types import Adapters, Routing


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    return None if case.plain else "the path is for inference with the gate's own routes, and adapters that see what the gate sees"


def run(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Add the adapters of one linear to a finished base output: ``base + middle(G x, A x) B``.

    Args:
        x: Input (M, h), contiguous, M >= 1.
        base: Base output (M, o), columns contiguous.
        adapters: The adapters of the layer, as contiguous tensors.
        routing: Top-k, routing temperature and ``allowed``.

    Returns:
        The output (M, o), contiguous, and the logits (M, N).
    """
    logits, down = torch.mm(x, adapters.gate.t()), torch.mm(x, adapters.lora_A.t())
    found = middle(logits, down, adapters, routing, max_rank=adapters.max_rank or 0)
    if base.dtype == found.dtype:
        return torch.addmm(base, found, adapters.lora_B), logits
    return base + torch.mm(found, adapters.lora_B), logits


def out_like(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :data:`library`."""
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], adapters.gate.shape[0]))


library = operator("library", out_like)(run)
