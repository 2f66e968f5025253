"""Many adapters and more than a few tokens: the work grows with the rows that tokens choose, not with the number of adapters.

There are three ways, all with the base product between A and B:

- "few" (:func:`few_forward`), for up to a few hundred tokens: each token is multiplied with its chosen rows. The steps are gates; routing and the chosen rows
  of A; base; the chosen rows of B, added to the base;
- "sorted_down" (:func:`sorted_down_forward`): tokens are sorted by adapter for A only, so that an adapter's rows are read once for all its tokens; B is added
  token by token, in one pass over the output;
- "sorted" (:func:`sorted_forward`), for more tokens: they are sorted by adapter for each slot, and B is added in blocks as well, slot by slot.

While a CUDA graph is captured, everything before B runs on a second stream, at the same time as the base's product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels.many_adapters.launch import blocks_down, blocks_up, gate_logits, gate_sums, routed_up, sort_tokens, tokens_down, tokens_up
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.products import library_products
from meteora_kernels.steps.second_stream import on_second_stream
from meteora_kernels.types import WHOLE, Adapters, Form, Group, Routing

__all__ = ["after", "before", "can_run", "few_forward", "out_like", "run", "run_layer", "sorted_down_forward", "sorted_forward"]

EXACT_TOKENS = 256
"""Up to this number of tokens the base product is computed in float32, so that the output is rounded once."""


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    dtype, facts = case.facts.dtype, case.facts
    if not case.plain:
        return "the path is for inference with the gate's own routes, and adapters that see what the gate sees"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if case.top_k > 16:
        return f"top-k is {case.top_k}, the kernels take up to 16"
    if facts.adapters > 4096:
        return f"there are {facts.adapters} adapters, the kernels take up to 4,096"
    if facts.max_rank > 256:
        return f"the largest rank is {facts.max_rank}, the kernels take up to 256"
    return None


def base_product(x: Tensor, weights: Tensor, pieces: int = 0) -> Tensor:
    """``x weights^T``: float32 partial sums (S, M, O), for up to EXACT_TOKENS tokens or if ``pieces`` asks for them; otherwise (M, O) in the dtype of x."""
    return library_products(x, weights, pieces or 1) if pieces or x.shape[0] <= EXACT_TOKENS else F.linear(x, weights)


def few_forward(x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing, pieces: int = 1) -> Tensor:
    """Base and adapters, token by token: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous, M >= 1.
        weights: The members' base weights, one after the other (O, h), columns contiguous.
        bias: Bias of all members (O,), or None.
        adapters: The members' adapters.
        routing: Top-k, routing temperature and ``allowed``.
        pieces: Number of partial sums of the base product (:func:`base_product`).
    """
    y = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    with on_second_stream(x) as join:
        chosen = tokens_down(x, gate_sums(x, adapters), adapters, routing)
    base = base_product(x, weights, pieces or 1)
    join()
    tokens_up(base, bias, chosen, adapters, y)
    return y


def sorted_down_forward(x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing, pieces: int = 0) -> Tensor:
    """Base and adapters, with tokens sorted by adapter for A; the arguments and the result are those of :func:`few_forward`."""
    y = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    with on_second_stream(x) as join:
        found = sort_tokens(gate_logits(x, adapters), adapters, routing, together=True)
        middle = blocks_down(x, found, adapters)
    base = base_product(x, weights, pieces)
    join()
    routed_up(base, bias, middle, found, adapters, y)
    return y


def sorted_forward(x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing, pieces: int = 0) -> Tensor:
    """Base and adapters, with tokens sorted by adapter; the arguments and the result are those of :func:`few_forward`."""
    y = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    with on_second_stream(x) as join:
        found = sort_tokens(gate_logits(x, adapters), adapters, routing)
        middle = blocks_down(x, found, adapters)
    base = base_product(x, weights, pieces)
    join()
    blocks_up(base, bias, middle, found, adapters, y)
    return y


FORWARDS = {"few": few_forward, "sorted_down": sorted_down_forward, "sorted": sorted_forward}
"""The ways, by the names that the tables use."""


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears, base and adapters together: (M, O), by the way that ``row`` names.

    Args:
        x: Input (M, h), columns contiguous, M >= 1.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table: ``way``, and ``pieces`` of the base product (:func:`base_product`).
        form: Ignored by this path.
    """
    return FORWARDS[row.way](x, group.weights, group.bias, group.adapters, routing, row.pieces)


def before(x: Tensor, adapters: Adapters, routing: Routing, row: Row, logits: Tensor | None = None) -> Any:
    """What one linear's adapters need besides the base output; an argument of :func:`after`.

    Args:
        x: Input (M, h), columns contiguous, M >= 1.
        adapters: The adapters of the layer.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table; its ``way`` is "few", "sorted_down" or "sorted".
        logits: Gate logits (M, N) if they are known; the gate is then not read.
    """
    logits = torch.mm(x, adapters.gate.t()) if logits is None else logits
    if row.way == "few":
        return tokens_down(x, logits.unsqueeze(0), adapters, routing)
    found = sort_tokens(logits, adapters, routing, together=row.way == "sorted_down")
    return blocks_down(x, found, adapters), found


def after(begun: Any, base: Tensor, adapters: Adapters, routing: Routing, row: Row) -> Tensor:
    """Add the adapters of one linear to a base output (M, o), columns contiguous: (M, o), contiguous. ``begun`` is the result of :func:`before`."""
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if row.way == "few":
        tokens_up(base, None, begun, adapters, y)
    else:
        middle, found = begun
        (routed_up if row.way == "sorted_down" else blocks_up)(base, None, middle, found, adapters, y)
    return y


def run_layer(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing, row: Row) -> tuple[Tensor, Tensor]:
    """The output of one linear (M, o) by the way that ``row`` names, and the gate logits (M, N); arguments as in :func:`before` and :func:`after`."""
    logits = torch.mm(x, adapters.gate.t())
    return after(before(x, adapters, routing, row, logits), base, adapters, routing, row), logits


def out_like(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :func:`run_layer`."""
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], adapters.gate.shape[0]))
