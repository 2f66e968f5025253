"""The adapters of one linear on top of a finished base output: the Triton backend.

:func:`meteora_kernels.plan.choose` chooses one of these paths:

- :mod:`few_tokens` for decoding: gates and A in one launch, routing and B in a second (with a third between them for many adapters);
- :mod:`meteora_kernels.many_adapters` for a large total rank: only the chosen adapters' rows are multiplied;
- :mod:`library` for a large total rank where tokens choose many of the rows: all products by the library;
- :mod:`many_tokens` for prefill and training: GEMMs over all R rows with the routing between them, and the corresponding backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import many_adapters
from meteora_kernels.dense import cast, flat_routes
from meteora_kernels.layer import few_tokens, library, many_tokens
from meteora_kernels.operators import eager, operator
from meteora_kernels.plan import Case, Facts, Row, choices_of, choose, table_of
from meteora_kernels.rank_rows import layout_of
from meteora_kernels.steps.second_stream import on_second_stream
from meteora_kernels.types import Adapters, Routing

_choices = choices_of("layers")
"""Rows by everything that they depend on, because a lookup takes less time than creating a :class:`Case`."""
CAN_RUN = {
    "few_tokens": few_tokens.can_run,
    "many_adapters": many_adapters.can_run,
    "library": library.can_run,
    "many_tokens": many_tokens.can_run,
}


def row_for(x: Tensor, adapters: Adapters, top_k: int, *, plain: bool = True, over: bool = False) -> Row:
    """The row of the table for these tokens.

    Args:
        x: Input of the layer (..., h).
        adapters: The adapters of the layer; without ``max_rank`` all rows are multiplied.
        top_k: Number of adapters per token k.
        plain: Whether the call needs neither gradients nor given routes nor a separate input of the adapters.
        over: Whether the base output is still to be computed.
    """
    gate, _, lora_B, _, _, max_rank, _, _ = adapters
    tokens, plain = x.shape[:-1].numel(), plain and max_rank is not None
    key = (tokens, top_k, plain, over, gate.shape, lora_B.shape, max_rank, x.dtype, x.device)
    compiling = torch.compiler.is_compiling()
    row = None if compiling else _choices.get(key)
    if row is None:
        facts = Facts(x.shape[-1], (lora_B.shape[1],), gate.shape[0], lora_B.shape[0], max_rank or 0, x.dtype, x.device)
        row = choose(table_of(x.device).layer, Case(facts, tokens, top_k, plain=plain, over=over), CAN_RUN)
        if not compiling:
            _choices[key] = row
    return row


@operator("few_tokens", few_tokens.out_like)
def few_tokens_operator(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """:func:`few_tokens.run` for compilers: the row is looked up when the operator runs, and the logits are contiguous."""
    output, logits = few_tokens.run(x, base, adapters, routing, row_for(x, adapters, routing.top_k))
    return output, logits.contiguous()


@operator("many_adapters", many_adapters.out_like)
def many_adapters_operator(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """:func:`meteora_kernels.many_adapters.run_layer` for compilers: the row is looked up when the operator runs."""
    return many_adapters.run_layer(x, base, adapters, routing, row_for(x, adapters, routing.top_k))


def mix(
    x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None = None, *, want_logits: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The layer, with the arguments and results of :func:`meteora_kernels.reference.mix`. Without ``want_logits`` the logits are None."""
    if not torch.is_autocast_enabled(x.device.type):
        return _flat(x, base_output, adapters, routing, lora_x, want_logits=want_logits)
    with torch.autocast(x.device.type, enabled=False):
        x, adapters, lora_x = cast(x, adapters, lora_x)
        return _flat(x, base_output, adapters, routing, lora_x, want_logits=want_logits)


def _flat(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None, *, want_logits: bool) -> tuple[Tensor, Tensor | None]:
    """Flatten the tokens, choose a path and run it, and restore the leading dimensions."""
    gate, lora_A, lora_B, scaling, offsets, max_rank, _, _ = adapters
    if lora_A.shape[0] == 0 or x.numel() == 0:
        return base_output.clone(), F.linear(x, gate) if routing.indices is None else None
    lora_x = None if lora_x is x else lora_x
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, base_output, gate, lora_A, lora_B))
    given = routing.indices is not None
    plain = not (wants_grad or given) and lora_x is None
    if plain and max_rank is None and not torch.compiler.is_compiling():
        max_rank = layout_of(offsets).max_rank
    if max_rank is not adapters.max_rank or not (gate.is_contiguous() and lora_A.is_contiguous() and lora_B.is_contiguous()):
        adapters = Adapters.of_layer(gate.contiguous(), lora_A.contiguous(), lora_B.contiguous(), scaling, offsets, max_rank)
    row = row_for(x, adapters, routing.top_k, plain=plain)
    if given:
        routing = many_tokens.contiguous_routes(flat_routes(routing))
    if wants_grad and eager(x):
        output, logits = many_tokens.differentiable(x, lora_x, base_output, adapters, routing, row.inline)
        return output, logits if want_logits and not given else None
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    base = base_output.reshape(-1, base_output.shape[-1])
    base = base if base.stride(-1) == 1 else base.contiguous()
    output, logits = run(row, tokens, None if lora_x is None else lora_x.reshape(tokens.shape), base, adapters, routing)
    output = output.view(base_output.shape)
    return output, logits[:, : gate.shape[0]].reshape(*x.shape[:-1], gate.shape[0]) if want_logits and not given else None


def run(row: Row, x: Tensor, lora_x: Tensor | None, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Add the adapters to a finished base output, by the path that a row of the table names.

    Args:
        row: Row of the table.
        x: Input (M, h), contiguous.
        lora_x: Input of the adapters (M, h) where it differs from ``x``, or None.
        base: Base output (M, o), columns contiguous.
        adapters: The adapters of the layer, as contiguous tensors.
        routing: How tokens choose their adapters.

    Returns:
        The output (M, o), and a tensor whose first N columns are the logits.
    """
    direct = eager(x)
    if row.path == "few_tokens":
        output, logits = few_tokens.run(x, base, adapters, routing, row) if direct else few_tokens_operator(x, base, adapters, routing)
    elif row.path == "many_adapters":
        output, logits = many_adapters.run_layer(x, base, adapters, routing, row) if direct else many_adapters_operator(x, base, adapters, routing)
    elif row.path == "library":
        output, logits = (library.run if direct else library.library)(x, base, adapters, routing)
    else:
        output, logits = (many_tokens.run if direct else many_tokens.many_tokens)(x, lora_x, base, adapters, routing, row.inline)
    return output, logits


OVERLAPPING: dict[str, Any] = {"few_tokens": few_tokens, "many_adapters": many_adapters, "library": library}
"""Paths whose work before B does not need the base output, by name."""
MOST_OVERLAPPING = 128
"""The largest number of tokens at which that work runs at the same time as the base's product; for more, the product fills the GPU."""


def mix_over(x: Tensor, product: Callable[[Tensor], Tensor], adapters: Adapters, routing: Routing) -> Tensor:
    """The layer for inference, where ``product`` computes the base output.

    While a CUDA graph for at most :data:`MOST_OVERLAPPING` tokens is captured, the work before B runs on a second stream, at the same time as the product.

    Args:
        x: Input of the layer (..., h), not empty.
        product: Function that computes ``W x`` plus bias (..., o) from x, in a new tensor, which may be overwritten.
        adapters: The adapters of the layer, with ``max_rank``.
        routing: Top-k, routing temperature and ``allowed``; no given routes.

    Returns:
        The output (..., o) in the dtype of the base output.
    """
    gate, lora_A, lora_B, scaling, offsets, max_rank, _, _ = adapters
    tokens, row = x.reshape(-1, x.shape[-1]).contiguous(), row_for(x, adapters, routing.top_k, over=True)
    if row.path not in OVERLAPPING or len(tokens) > MOST_OVERLAPPING:
        return mix(x, product(x), adapters, routing, want_logits=False)[0]
    if not (gate.is_contiguous() and lora_A.is_contiguous() and lora_B.is_contiguous()):
        adapters = Adapters.of_layer(gate.contiguous(), lora_A.contiguous(), lora_B.contiguous(), scaling, offsets, max_rank)
    path = OVERLAPPING[row.path]
    with on_second_stream(x) as join:
        begun = path.before(tokens, adapters, routing, row)
    output = product(x)
    base = output.reshape(-1, output.shape[-1])
    join()
    mixed: Tensor = path.after(begun, base if base.stride(-1) == 1 else base.contiguous(), adapters, routing, row).view(output.shape)
    return mixed
