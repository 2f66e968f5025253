"""Dense backend: vectorised PyTorch on any device, with a hand-written backward pass.

The work consists of two products, and each can be computed in two ways that give the same numbers:

- *dots*: the ``k * r`` inner products of a token with the rows of its chosen adapters (``A x`` forward, ``B dy`` backward), by one
  GEMM over all R rows followed by a gather of the chosen ones, or for the chosen rows alone (on a CPU, in float32 or float64 or for few tokens);
- *sums*: the weighted sum of the chosen rows (``B`` forward, ``A`` backward), by a GEMM whose left matrix is zero at rows that were not
  chosen, or by a gather of the chosen rows alone (on a CPU).

A GEMM does several times more multiplications per second, but a gather needs ``R / (k * r)`` times fewer of them. :func:`ways` compares the two by rates
that were measured on a CPU with AVX-512.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora_kernels.rank_rows import Layout, layout_of
from meteora_kernels.reference import routing_weights, top_indices
from meteora_kernels.types import Adapters, Routing

DOTS_GAIN = 5.0
"""The ratio of a GEMM's multiplication rate to that of gathered dots, in float32 on a CPU."""
SUMS_GAIN = {torch.float32: 2.0, torch.float64: 4.0, torch.bfloat16: 4.0, torch.float16: 8.0}
"""The ratio of a GEMM's multiplication rate to that of gathered sums on a CPU, by dtype."""
FEW_TOKENS = {torch.float32: 2, torch.float64: 2, torch.bfloat16: 16, torch.float16: 16}
"""Up to this number of tokens, copies of the chosen rows are faster on a CPU than the other ways, by dtype: the time of a GEMM is the time to read its
weights, and the operators for ``rows`` are slow for 16-bit weights."""


class Ways(NamedTuple):
    """How a pass computes its dots and its sums."""

    dots: Literal["gemm", "rows", "copies"]
    sums: Literal["gemm", "rows", "copies"]


def ways(tokens: int, layout: Layout, top_k: int, dtype: torch.dtype, device: str) -> Ways:
    """How to compute dots and sums: by a ``gemm`` over all rows, by the chosen ``rows``, or by ``copies`` of the chosen rows (for few tokens)."""
    if device != "cpu" or dtype not in SUMS_GAIN:
        return Ways("gemm", "gemm")
    saving = layout.total_rank / max(top_k * layout.max_rank, 1)
    if tokens <= FEW_TOKENS[dtype] and saving >= 2:
        return Ways("copies", "copies")
    exact = dtype in (torch.float32, torch.float64)
    return Ways("rows" if exact and saving > DOTS_GAIN else "gemm", "rows" if saving > SUMS_GAIN[dtype] else "gemm")


def dots(tokens: Tensor, matrix: Tensor, rows: Tensor, way: str) -> Tensor:
    """Inner products of every token with its chosen rows of a matrix.

    Args:
        tokens: Tokens (M, d).
        matrix: Rows (R, d), in the dtype of ``tokens``.
        rows: Indices of the chosen rows, int64 (M, c).
        way: The method, a field of :class:`Ways`.

    Returns:
        Inner products (M, c).
    """
    count, width = rows.shape
    if way == "gemm":
        return torch.mm(tokens, matrix.t()).gather(1, rows)
    if way == "copies":
        copies = matrix.index_select(0, rows.view(-1))
        if count == 1:
            return torch.mv(copies, tokens.view(-1)).view(1, width)
        return torch.bmm(copies.view(count, width, -1), tokens.unsqueeze(2)).squeeze(2)
    starts = torch.arange(0, count * width, width, device=rows.device)
    owner = torch.arange(count, device=rows.device).repeat_interleave(width)
    # This derivative of an embedding bag is exactly the wanted set of inner products, threaded over tokens.
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(tokens.contiguous(), matrix, rows.view(-1), starts, owner, 0)
    return found.view(count, width)


def sums(matrix: Tensor, rows: Tensor, weights: Tensor, way: str, add: Tensor | None = None) -> Tensor:
    """Weighted sum of every token's chosen rows of a matrix, on top of ``add``.

    Args:
        matrix: Rows (R, d).
        rows: Indices of the chosen rows, int64 (M, c).
        weights: Weights of the chosen rows (M, c), in the dtype of ``matrix``.
        way: The method, a field of :class:`Ways`.
        add: A summand (M, d), or None.

    Returns:
        Sums (M, d).
    """
    if way == "rows":
        total = F.embedding_bag(rows, matrix, mode="sum", per_sample_weights=weights)
        return total if add is None else (total.add_(add) if total.dtype == add.dtype else total + add)
    if way == "copies":
        count = rows.shape[0]
        copies = matrix.index_select(0, rows.view(-1))
        if count > 1:
            total = torch.bmm(weights.unsqueeze(1), copies.view(count, rows.shape[1], -1)).squeeze(1)
        elif add is not None and add.dtype == matrix.dtype:
            return torch.addmv(add.view(-1), copies.t(), weights.view(-1)).view(1, -1)
        else:
            total = torch.mv(copies.t(), weights.view(-1)).view(1, -1)
        return total if add is None else add + total
    middle = spread_rows(rows, weights, matrix.shape[0])
    if add is None:
        return torch.mm(middle, matrix)
    return torch.addmm(add, middle, matrix) if add.dtype == matrix.dtype else add + torch.mm(middle, matrix)


def spread_rows(rows: Tensor, weights: Tensor, total: int) -> Tensor:
    """A matrix (M, R) with ``weights`` at ``rows`` and 0 elsewhere."""
    return weights.new_zeros(rows.shape[0], total).scatter_add_(1, rows, weights)


def choose(logits: Tensor, top_k: int, temperature: float, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`meteora_kernels.reference.route` without gradients, in fewer passes for small k.

    Args:
        logits: Gate logits (M, N).
        top_k: Number of adapters per token, 1 <= top_k <= N.
        temperature: Routing temperature, T > 0.
        allowed: Mask of the adapters that may be chosen, bool (N,), or None for all.

    Returns:
        Indices int64 (M, k) and weights (M, k), float32 (float64 for float64 logits).
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if top_k == 2:
        # max(dim) returns the first of equal values and prefers NaN, as argmax does, in fewer passes over the row.
        first = logits.max(dim=1, keepdim=True).indices
        second = logits.scatter(1, first, float("-inf")).max(dim=1, keepdim=True).indices
        indices = torch.cat((first, second), dim=1)
    else:
        indices = top_indices(logits, top_k)
    chosen = logits.gather(1, indices)
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    return indices, torch.softmax(chosen, dim=1) if temperature == 1.0 else routing_weights(chosen, temperature)


class Forward(NamedTuple):
    """Results of the forward pass that the backward pass needs."""

    output: Tensor
    logits: Tensor | None
    indices: Tensor
    weights: Tensor
    down: Tensor


def forward(x: Tensor, lora_x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing) -> Forward:
    """The layer on flat tokens: x and lora_x (M, h), base_output (M, o), given indices and weights (M, k) each.

    Returns:
        Output (M, o); logits (M, N), or None where routes are given; indices int64 (M, k); weights (M, k); down (M, k * max_rank), the chosen rows of
        ``A x``.
    """
    logits, given, layout = None, routing.given, layout_of(adapters.offsets)
    if given is None:
        logits = torch.mm(x, adapters.gate.t())
        given = choose(logits, routing.top_k, routing.temperature, routing.allowed)
    indices, weights = given
    how = ways(x.shape[0], layout, indices.shape[1], adapters.lora_A.dtype, x.device.type)
    rows, coefficients = expand(indices, weights, adapters.scaling, layout)
    down = dots(lora_x, adapters.lora_A, rows, how.dots)
    output = sums(adapters.lora_B, rows, scaled(down, coefficients), how.sums, base_output)
    return Forward(output, logits, indices, weights, down)


def expand(indices: Tensor, weights: Tensor, scaling: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The chosen rows, int64 (M, k * r), and ``w_j * s_j`` (M, k, 1), or (M, k, r) where ranks differ: places past an adapter's rank get 0."""
    count = indices.shape[0]
    flat = indices.reshape(-1)
    rows = layout.rows.index_select(0, flat).view(count, -1)
    coefficients = (weights * scaling.index_select(0, flat).view_as(weights)).unsqueeze(-1)
    if layout.valid is not None:
        coefficients = coefficients * layout.valid.index_select(0, flat).view(*indices.shape, -1)
    return rows, coefficients


def scaled(values: Tensor, coefficients: Tensor) -> Tensor:
    """Values (M, k * r) times coefficients (M, k, 1 or r), in the dtype of the values."""
    return (values.view(*coefficients.shape[:2], -1) * coefficients).view_as(values).to(values.dtype)


class _Mixture(torch.autograd.Function):
    """The differentiable form of :func:`forward`; the choice of adapters is constant, and their weights are differentiated through the softmax."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_x: Tensor | None, base_output: Tensor, *flat: Any) -> tuple[Tensor, Tensor | None]:
        """``flat`` holds gate, A, B and the given weights, because autograd does not look into named tuples, then ``adapters`` and ``routing``."""
        *_, adapters, routing = flat
        done = forward(x, x if lora_x is None else lora_x, base_output, adapters, routing)
        gate, lora_A, lora_B, scaling, *_ = adapters
        ctx.save_for_backward(x, lora_x, gate, lora_A, lora_B, scaling, done.indices, done.weights, done.down)
        ctx.layout, ctx.temperature, ctx.routed = layout_of(adapters.offsets), routing.temperature, routing.given is None
        ctx.set_materialize_grads(False)
        return done.output, done.logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        x, lora_x, gate, lora_A, lora_B, scaling, indices, weights, down = ctx.saved_tensors
        need_x, need_lora_x, need_base, need_gate, need_A, need_B = ctx.needs_input_grad[:6]
        need_weights = ctx.needs_input_grad[6]
        layout: Layout = ctx.layout
        seen = x if lora_x is None else lora_x
        need_seen = need_x if lora_x is None else need_lora_x
        grad_x = grad_seen = grad_A = grad_B = grad_weights = None
        if grad is not None:
            how = ways(x.shape[0], layout, indices.shape[1], lora_A.dtype, x.device.type)
            rows, coefficients = expand(indices, weights, scaling, layout)
            narrow = grad.to(lora_B.dtype)
            up = dots(narrow, lora_B, rows, how.dots)
            if need_seen or need_A:
                grad_down = scaled(up, coefficients)
            if need_A:
                grad_A = torch.mm(spread_rows(rows, grad_down, layout.total_rank).t(), seen)
            if need_B:
                grad_B = torch.mm(spread_rows(rows, scaled(down, coefficients), layout.total_rank).t(), narrow)
            if need_seen:
                grad_seen = sums(lora_A, rows, grad_down, how.sums)
            if need_weights or (ctx.routed and (need_x or need_gate)):
                product = up.to(weights.dtype) * down
                product = product.view(*indices.shape, -1)
                if layout.valid is not None:
                    product = product * layout.valid[indices]
                grad_weights = product.sum(dim=-1) * scaling.to(weights.dtype)[indices]
                if ctx.routed:
                    chosen = torch._softmax_backward_data(grad_weights, weights, 1, weights.dtype).div_(ctx.temperature)
                    dense = chosen.new_zeros(x.shape[0], layout.adapters).scatter_add_(1, indices, chosen)
                    grad_logits = dense.to(gate.dtype) if grad_logits is None else grad_logits + dense.to(grad_logits.dtype)
        grad_gate = None
        if ctx.routed and grad_logits is not None:
            if need_gate:
                grad_gate = torch.mm(grad_logits.t(), x)
            if need_x:
                join = grad_seen if lora_x is None else None
                grad_x = torch.mm(grad_logits, gate) if join is None else join.addmm_(grad_logits, gate)
        elif lora_x is None:
            grad_x = grad_seen
        grads = (grad_x, grad_seen if lora_x is not None else None, grad if need_base else None, grad_gate, grad_A, grad_B)
        return *grads, grad_weights if need_weights else None, None, None


def mix(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The layer, with the arguments and results of :func:`meteora_kernels.reference.mix`."""
    if not torch.is_autocast_enabled(x.device.type):
        return _flat(x, base_output, adapters, routing, lora_x)
    with torch.autocast(x.device.type, enabled=False):
        x, adapters, lora_x = cast(x, adapters, lora_x)
        return _flat(x, base_output, adapters, routing, lora_x)


def cast(x: Tensor, adapters: Adapters, lora_x: Tensor | None) -> tuple[Tensor, Adapters, Tensor | None]:
    """``x``, the adapters' tensors and ``lora_x`` in the dtype of autocast."""
    dtype = torch.get_autocast_dtype(x.device.type)
    adapters = adapters._replace(gate=adapters.gate.to(dtype), lora_A=adapters.lora_A.to(dtype), lora_B=adapters.lora_B.to(dtype))
    return x.to(dtype), adapters, None if lora_x is None else lora_x.to(dtype)


def _flat(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Flatten the tokens, run, and restore the leading dimensions."""
    lead = x.shape[:-1]
    count, hidden = adapters.gate.shape
    tokens = x.reshape(-1, hidden)
    flat_base = base_output.reshape(-1, base_output.shape[-1])
    if layout_of(adapters.offsets).max_rank == 0 or tokens.shape[0] == 0:
        return base_output.clone(), F.linear(x, adapters.gate) if routing.given is None else None
    flat_lora_x = None if lora_x is None or lora_x is x else lora_x.reshape(-1, hidden)
    routing = flat_routes(routing)
    if torch.is_grad_enabled():
        output, logits = _Mixture.apply(tokens, flat_lora_x, flat_base, *adapters[:3], routing.weights, adapters, routing)  # type: ignore[no-untyped-call]
    else:
        output, logits, *_ = forward(tokens, tokens if flat_lora_x is None else flat_lora_x, flat_base, adapters, routing)
    return output.view(base_output.shape), None if logits is None else logits.view(*lead, count)


def flat_routes(routing: Routing) -> Routing:
    """The routing with given indices and weights flattened to (M, k), and with their k."""
    if routing.indices is None or routing.weights is None:
        return routing
    top_k = routing.indices.shape[-1]
    return routing._replace(top_k=top_k, indices=routing.indices.reshape(-1, top_k), weights=routing.weights.reshape(-1, top_k))
