"""Adapters on top of a finished base output, for prefill and training: GEMMs over all R rows with the routing between them, and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora_kernels.operators import operator
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.stacked import gate_rows_of, pack, stacked_rows_of
from meteora_kernels.steps.middle import Gradients, middle, middle_backward
from meteora_kernels.steps.up import up
from meteora_kernels.types import Adapters, Routing


def can_run(case: Case, row: Row) -> str | None:
    """None: this path can run every case."""
    return None


def contiguous_routes(routing: Routing) -> Routing:
    """The routing with given routes as the kernels read them: contiguous, and the weights in float32."""
    if routing.indices is None or routing.weights is None:
        return routing
    return routing._replace(indices=routing.indices.contiguous(), weights=routing.weights.to(torch.float32).contiguous())


def run(x: Tensor, lora_x: Tensor | None, base: Tensor, adapters: Adapters, routing: Routing, inline: bool) -> tuple[Tensor, Tensor]:
    """A GEMM over [G; A], the middle, and a GEMM over B that is added to the base output.

    Args:
        x: Input (M, h), contiguous.
        lora_x: Input of the adapters (M, h) where it differs from ``x``, or None.
        base: Base output (M, o), columns contiguous.
        adapters: The adapters of the layer, as contiguous tensors.
        routing: How tokens choose their adapters; given routes as :func:`contiguous_routes` returns them.
        inline: Whether every program of the pass over B routes its tokens itself, instead of a separate launch before it.

    Returns:
        The output (M, o), and the products (M, stacked): logits in the first N columns (not set for given routes), ``A x`` from ``gate_rows_of(N)`` on.
    """
    gate, lora_A = adapters.gate, adapters.lora_A
    number, rank = gate.shape[0], lora_A.shape[0]
    begin, given = gate_rows_of(number), routing.indices is not None
    if lora_x is None and not given:
        products = torch.nn.functional.linear(x, pack(gate, lora_A))
    else:
        products = x.new_zeros(x.shape[0], stacked_rows_of(number, rank))
        torch.mm(x if lora_x is None else lora_x, lora_A.t(), out=products[:, begin : begin + rank])
        if not given:
            torch.mm(x, gate.t(), out=products[:, :number])
    down = products[:, begin : begin + rank]
    output = torch.empty_like(base, memory_format=torch.contiguous_format)
    if inline and not given:
        up(down, adapters, base, output, logits=products, routing=routing)
    else:
        up(middle(products, down, adapters, routing), adapters, base, output)
    return output, products


def out_like(x: Tensor, lora_x: Tensor | None, base: Tensor, adapters: Adapters, routing: Routing, inline: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :data:`many_tokens`."""
    rows = stacked_rows_of(adapters.gate.shape[0], adapters.lora_A.shape[0])
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], rows))


many_tokens = operator("many_tokens", out_like)(run)


def backward_like(
    grad: Tensor, grad_products: Tensor | None, products: Tensor, x: Tensor, lora_x: Tensor | None, adapters: Adapters, routing: Routing, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors like the results of :data:`many_tokens_backward`."""
    likes = (x, x, adapters.gate, adapters.lora_A, adapters.lora_B)
    asked = (wanted[0], wanted[1] and lora_x is not None, wanted[2], wanted[3], wanted[4])
    first, second, third, fourth, fifth = (x.new_empty(like.shape) if ask else x.new_empty(0) for like, ask in zip(likes, asked, strict=True))
    return first, second, third, fourth, fifth


@operator("many_tokens_backward", backward_like)
def many_tokens_backward(
    grad: Tensor, grad_products: Tensor | None, products: Tensor, x: Tensor, lora_x: Tensor | None, adapters: Adapters, routing: Routing, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, lora_x, gate, A and B; those that are not wanted are empty.

    Args:
        grad: Gradient of the output (M, o).
        grad_products: Gradient of the logits from other uses of them (M, N) or wider, or None.
        products: The products that :func:`run` returned.
        x, lora_x, adapters, routing: The arguments of :func:`run`.
        wanted: One flag for each of the five results.
    """
    gate, lora_A, lora_B = adapters.gate, adapters.lora_A, adapters.lora_B
    number, rank = gate.shape[0], lora_A.shape[0]
    begin, given = gate_rows_of(number), routing.indices is not None
    seen = x if lora_x is None else lora_x
    down = products[:, begin : begin + rank]
    slopes = x.new_zeros(products.shape)
    slope_logits, slope_down = slopes[:, :number], slopes[:, begin : begin + rank]
    extra = None if grad_products is None or given else grad_products.contiguous()
    grads = Gradients(torch.mm(grad, lora_B.t()), extra, slope_logits, slope_down)
    again = middle_backward(products, down, grads, adapters, routing, want_middle=wanted[4])
    grad_x, grad_lora_x, grad_gate, grad_A, grad_B = (x.new_empty(0) for _ in range(5))
    if wanted[0]:
        if lora_x is None and not given:
            grad_x = torch.mm(slopes, pack(gate, lora_A))
        elif lora_x is None:
            grad_x = torch.mm(slope_down, lora_A)
        elif not given:
            grad_x = torch.mm(slope_logits, gate)
        else:
            grad_x = torch.zeros_like(x)
    if wanted[1] and lora_x is not None:
        grad_lora_x = torch.mm(slope_down, lora_A)
    if wanted[2]:
        grad_gate = torch.zeros_like(gate) if given else torch.mm(slopes[:, :begin].t(), x)[:number].contiguous()
    if wanted[3]:
        grad_A = torch.mm(slope_down.t(), seen)
    if again is not None:
        grad_B = torch.mm(again.t(), grad)
    return grad_x, grad_lora_x, grad_gate, grad_A, grad_B


def _save(ctx: Any, products: Tensor, x: Tensor, lora_x: Tensor | None, adapters: Adapters, routing: Routing) -> None:
    """Save the tensors that the backward pass needs."""
    gate, lora_A, lora_B, *ctx.others = adapters
    ctx.save_for_backward(products, x, lora_x, gate, lora_A, lora_B)
    ctx.routing = routing
    ctx.set_materialize_grads(False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_x, _, adapters, routing, _ = many_tokens.values(inputs)
    _save(ctx, output[1], x, lora_x, adapters, routing)


def _backward(ctx: Any, grad: Tensor | None, grad_products: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's flat arguments."""
    products, x, lora_x, gate, lora_A, lora_B = ctx.saved_tensors
    if grad is None:
        grad = x.new_zeros(x.shape[0], lora_B.shape[1])
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3], needs[4], needs[5]]
    grads: list[Tensor | None] = [None] * 5
    if any(wanted):
        adapters = Adapters(gate, lora_A, lora_B, *ctx.others)
        found = many_tokens_backward(grad.contiguous(), grad_products, products, x, lora_x, adapters, ctx.routing, wanted)
        grads = [tensor if want else None for tensor, want in zip(found, wanted, strict=True)]
    return grads[0], grads[1], grad if needs[2] else None, grads[2], grads[3], grads[4], *(None,) * (len(needs) - 6)


torch.library.register_autograd("meteora::many_tokens", _backward, setup_context=_setup)


class _Many(torch.autograd.Function):
    """:func:`run` with gradients, for eager code: the registered autograd formula above takes longer than the rest of the call.

    x and lora_x (..., h), base (..., o); returns the output (..., o) and the logits (..., N).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_x: Tensor | None, base: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        """``flat`` holds gate, A and B, because autograd does not look into named tuples, then ``adapters``, ``routing`` and ``inline``."""
        _, _, _, adapters, routing, inline = flat
        tokens, flat_base = x.reshape(-1, x.shape[-1]).contiguous(), base.reshape(-1, base.shape[-1])
        flat_base = flat_base if flat_base.stride(-1) == 1 else flat_base.contiguous()
        flat_lora_x = None if lora_x is None else lora_x.reshape(tokens.shape)
        output, products = run(tokens, flat_lora_x, flat_base, adapters, routing, inline)
        _save(ctx, products, tokens, flat_lora_x, adapters, routing)
        ctx.shape, number = x.shape, adapters.gate.shape[0]
        return output.view(base.shape), products[:, :number].view(*x.shape[:-1], number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        flat = None if grad is None else grad.reshape(-1, grad.shape[-1])
        flat_logits = None if grad_logits is None else grad_logits.reshape(-1, grad_logits.shape[-1])
        grad_x, grad_lora_x, _, *rest = _backward(ctx, flat, flat_logits)
        shaped = (None if found is None else found.view(ctx.shape) for found in (grad_x, grad_lora_x))
        return *shaped, grad if ctx.needs_input_grad[2] else None, *rest


def differentiable(x: Tensor, lora_x: Tensor | None, base: Tensor, adapters: Adapters, routing: Routing, inline: bool) -> tuple[Tensor, Tensor]:
    """:func:`run` for tokens with any leading dimensions, with gradients; returns the output (..., o) and the logits (..., N)."""
    output, logits = _Many.apply(x, lora_x, base, *adapters[:3], adapters, routing, inline)  # type: ignore[no-untyped-call]
    return output, logits
