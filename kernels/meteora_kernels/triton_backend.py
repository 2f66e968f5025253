"""The Triton backend: custom operators that torch.compile, FakeTensor and autograd know, and the choice of a path among them.

Paths (``plan.py`` holds the limits):

- ``few``: decoding; gates and A in one launch, routing and B in a second (a third between them for many adapters);
- ``many``: prefill and training; GEMMs over all R rows with :mod:`triton_middle` between them, and the same backwards;
- ``chosen``: a large total rank; only the chosen adapters' rows, by :mod:`many_adapters`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora_kernels import plan
from meteora_kernels.dense import cast, flat_routes
from meteora_kernels.layout import layout_of
from meteora_kernels.many_adapters import layer_forward
from meteora_kernels.operators import eager, operator
from meteora_kernels.stacked import gate_rows_of, pack, stacked_rows_of
from meteora_kernels.triton_delta import delta
from meteora_kernels.triton_few import mix_few
from meteora_kernels.triton_middle import middle, middle_backward
from meteora_kernels.types import Adapters, Routing


def _mix_few(
    x: Tensor,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    max_rank: int,
    top_k: int,
    temperature: float,
    dense_down: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`triton_few.mix_few`; the logits come back contiguous."""
    output, logits = mix_few(x, base, gate, lora_A, lora_B, scaling, offsets, max_rank, top_k, temperature, allowed, dense_down=dense_down)
    return output, logits.contiguous()


mix_few_op = operator("mix_few")(_mix_few)


@torch.library.register_fake("meteora::mix_few")
def _(
    x: Tensor,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    max_rank: int,
    top_k: int,
    temperature: float,
    dense_down: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], gate.shape[0]), dtype=torch.float32)


def _mix_chosen(
    x: Tensor,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    max_rank: int,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """:func:`many_adapters.layer_forward`, and the gate's logits (M, N)."""
    logits = torch.mm(x, gate.t())
    adapters = Adapters.of_layer(gate, lora_A, lora_B, scaling, offsets, max_rank)
    way = plan.many_adapters_way(x.shape[0], lora_A.shape[0], top_k, max_rank, fused=False)
    return layer_forward(way or "sorted", x, base, logits, adapters, Routing(top_k, temperature, allowed)), logits


mix_chosen_op = operator("mix_chosen")(_mix_chosen)


@torch.library.register_fake("meteora::mix_chosen")
def _(
    x: Tensor,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    max_rank: int,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], gate.shape[0]))


def _mix_many(
    x: Tensor,
    lora_x: Tensor | None,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """GEMM over [G; A], the middle, GEMM over B on top of the base.

    Returns:
        (M, o), and the products (M, stacked): logits in the first N columns (unset with given routes), ``A x`` from ``gate_rows_of(N)`` on.
    """
    adapters, rank = gate.shape[0], lora_A.shape[0]
    begin = gate_rows_of(adapters)
    routes = None if indices is None or weights is None else (indices, weights)
    if lora_x is None and routes is None:
        products = F.linear(x, pack(gate, lora_A))
    else:
        products = x.new_zeros(x.shape[0], stacked_rows_of(adapters, rank))
        torch.mm(x if lora_x is None else lora_x, lora_A.t(), out=products[:, begin : begin + rank])
        if routes is None:
            torch.mm(x, gate.t(), out=products[:, :adapters])
    down = products[:, begin : begin + rank]
    output = torch.empty_like(base, memory_format=torch.contiguous_format)
    if routes is None and x.shape[0] <= plan.INLINE_TOKENS:
        delta(down, lora_B, base, output, (base.shape[1],), rank, 0, (products, scaling, offsets, top_k, temperature, allowed))
    else:
        inner = middle(products, down, scaling, offsets, top_k, temperature, allowed, routes)
        delta(inner, lora_B, base, output, (base.shape[1],), rank, rank)
    return output, products


mix_many_op = operator("mix_many")(_mix_many)


@torch.library.register_fake("meteora::mix_many")
def _(
    x: Tensor,
    lora_x: Tensor | None,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], stacked_rows_of(gate.shape[0], lora_A.shape[0])))


def _mix_many_backward(
    grad: Tensor,
    grad_products: Tensor | None,
    products: Tensor,
    x: Tensor,
    lora_x: Tensor | None,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    temperature: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, lora_x, gate, A and B; those not wanted come back empty.

    Args:
        grad: (M, o).
        grad_products: (M, N) or wider, that reached the logits on another way, or None.
        products: As :func:`_mix_many` returned them.
        wanted: One flag a result.
    """
    adapters, rank = gate.shape[0], lora_A.shape[0]
    begin = gate_rows_of(adapters)
    routes = None if indices is None or weights is None else (indices, weights)
    seen = x if lora_x is None else lora_x
    down = products[:, begin : begin + rank]
    grad_middle = torch.mm(grad, lora_B.t())
    slopes = x.new_zeros(products.shape)
    slope_logits, slope_down = slopes[:, :adapters], slopes[:, begin : begin + rank]
    extra = None if grad_products is None or routes is not None else grad_products.contiguous()
    again = middle_backward(products, down, grad_middle, extra, scaling, offsets, top_k, temperature, (slope_logits, slope_down), allowed, routes, wanted[4])
    grad_x, grad_lora_x, grad_gate, grad_A, grad_B = (x.new_empty(0) for _ in range(5))
    if wanted[0]:
        if lora_x is None and routes is None:
            grad_x = torch.mm(slopes, pack(gate, lora_A))
        elif lora_x is None:
            grad_x = torch.mm(slope_down, lora_A)
        elif routes is None:
            grad_x = torch.mm(slopes[:, :adapters], gate)
        else:
            grad_x = torch.zeros_like(x)
    if wanted[1] and lora_x is not None:
        grad_lora_x = torch.mm(slope_down, lora_A)
    if wanted[2]:
        grad_gate = torch.zeros_like(gate) if routes is not None else torch.mm(slopes[:, :begin].t(), x)[:adapters].contiguous()
    if wanted[3]:
        grad_A = torch.mm(slope_down.t(), seen)
    if again is not None:
        grad_B = torch.mm(again.t(), grad)
    return grad_x, grad_lora_x, grad_gate, grad_A, grad_B


mix_many_backward_op = operator("mix_many_backward")(_mix_many_backward)


@torch.library.register_fake("meteora::mix_many_backward")
def _(
    grad: Tensor,
    grad_products: Tensor | None,
    products: Tensor,
    x: Tensor,
    lora_x: Tensor | None,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    temperature: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    likes = (x, x, gate, lora_A, lora_B)
    asked = (wanted[0], wanted[1] and lora_x is not None, wanted[2], wanted[3], wanted[4])
    first, second, third, fourth, fifth = (x.new_empty(like.shape) if ask else x.new_empty(0) for like, ask in zip(likes, asked, strict=True))
    return first, second, third, fourth, fifth


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_x, _, gate, lora_A, lora_B, scaling, offsets, allowed, indices, weights, top_k, temperature = inputs
    ctx.save_for_backward(output[1], x, lora_x, gate, lora_A, lora_B, scaling, offsets, allowed, indices, weights)
    ctx.top_k, ctx.temperature = top_k, temperature
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_products: Tensor | None) -> tuple[Tensor | None, ...]:
    products, x, lora_x, gate, lora_A, lora_B, *rest = ctx.saved_tensors
    if grad is None:
        grad = x.new_zeros(x.shape[0], lora_B.shape[1])
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3], needs[4], needs[5]]
    grads: list[Tensor | None] = [None] * 5
    if any(wanted):
        tensors = (products, x, lora_x, gate, lora_A, lora_B, *rest)
        work: Any = _mix_many_backward if eager(x) else mix_many_backward_op
        found = work(grad.contiguous(), grad_products, *tensors, ctx.top_k, ctx.temperature, wanted)
        grads = [tensor if want else None for tensor, want in zip(found, wanted, strict=True)]
    return grads[0], grads[1], grad if needs[2] else None, grads[2], grads[3], grads[4], *(None,) * 7


torch.library.register_autograd("meteora::mix_many", _backward, setup_context=_setup)


class _Many(torch.autograd.Function):
    """:func:`_mix_many` with its gradients, for eager code: what the registration above does takes longer than the whole rest of the call.

    x and lora_x (..., h), base (..., o); returns the output (..., o) and the logits (..., N).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_x: Tensor | None,
        base: Tensor,
        gate: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        offsets: Tensor,
        allowed: Tensor | None,
        indices: Tensor | None,
        weights: Tensor | None,
        top_k: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        tokens, flat_base = _flat_inputs(x, base)
        flat_lora_x = None if lora_x is None else lora_x.reshape(tokens.shape)
        tensors = (gate, lora_A, lora_B, scaling, offsets, allowed, indices, weights)
        output, products = _mix_many(tokens, flat_lora_x, flat_base, *tensors, top_k, temperature)
        ctx.save_for_backward(products, tokens, flat_lora_x, *tensors)
        ctx.top_k, ctx.temperature, ctx.shape = top_k, temperature, x.shape
        ctx.set_materialize_grads(False)
        return output.view(base.shape), products[:, : gate.shape[0]].view(*x.shape[:-1], gate.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        flat = None if grad is None else grad.reshape(-1, grad.shape[-1])
        flat_logits = None if grad_logits is None else grad_logits.reshape(-1, grad_logits.shape[-1])
        grad_x, grad_lora_x, _, *rest = _backward(ctx, flat, flat_logits)
        shaped = (None if found is None else found.view(ctx.shape) for found in (grad_x, grad_lora_x))
        return *shaped, grad if ctx.needs_input_grad[2] else None, *rest


def mix(
    x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None = None, *, want_logits: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result as in :func:`meteora_kernels.reference.mix`. Without ``want_logits`` the logits come back as None."""
    if not torch.is_autocast_enabled(x.device.type):
        return _flat(x, base_output, adapters, routing, lora_x, want_logits=want_logits)
    with torch.autocast(x.device.type, enabled=False):
        x, adapters, lora_x = cast(x, adapters, lora_x)
        return _flat(x, base_output, adapters, routing, lora_x, want_logits=want_logits)


def _flat_inputs(x: Tensor, base_output: Tensor) -> tuple[Tensor, Tensor]:
    """(M, h) contiguous, and (M, o) with contiguous columns."""
    base = base_output.reshape(-1, base_output.shape[-1])
    return x.reshape(-1, x.shape[-1]).contiguous(), base if base.stride(-1) == 1 else base.contiguous()


def _flat(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None, *, want_logits: bool) -> tuple[Tensor, Tensor | None]:
    """Flatten the tokens, pick the path, and give the leading dimensions back."""
    gate, lora_A, lora_B, scaling, offsets, max_rank, *_ = adapters
    lead = x.shape[:-1]
    number, hidden = gate.shape
    rank = lora_A.shape[0]
    count = x.shape[:-1].numel()
    if rank == 0 or count == 0:
        return base_output.clone(), F.linear(x, gate) if routing.indices is None else None
    lora_A, lora_B, gate = lora_A.contiguous(), lora_B.contiguous(), gate.contiguous()
    lora_x = None if lora_x is x else lora_x
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, base_output, gate, lora_A, lora_B))
    path = "many"
    if not differentiable and routing.indices is None and lora_x is None:
        if max_rank is None and not torch.compiler.is_compiling():
            max_rank = layout_of(offsets).max_rank
        if max_rank is not None:
            path = plan.path(count, rank, routing.top_k, max_rank)
    directly = eager(x)
    routing = flat_routes(routing)
    top_k, temperature, allowed, indices, weights = routing
    if indices is not None and weights is not None:
        indices, weights = indices.contiguous(), weights.to(torch.float32).contiguous()
    tensors = (gate, lora_A, lora_B, scaling, offsets, allowed)
    if directly and differentiable:
        output, logits = _Many.apply(x, lora_x, base_output, *tensors, indices, weights, top_k, temperature)  # type: ignore[no-untyped-call]
        return output, logits if indices is None and want_logits else None
    tokens, base = _flat_inputs(x, base_output)
    if path == "few":
        sparse = plan.chosen_rows_only(rank, top_k, max_rank or 0)
        output, logits = (_mix_few if directly else mix_few_op)(tokens, base, *tensors, max_rank or 0, top_k, temperature, not sparse)
    elif path == "chosen":
        output, logits = (_mix_chosen if directly else mix_chosen_op)(tokens, base, *tensors, max_rank or 0, top_k, temperature)
    else:
        flat_lora_x = None if lora_x is None else lora_x.reshape(-1, hidden)
        output, logits = (_mix_many if directly else mix_many_op)(tokens, flat_lora_x, base, *tensors, indices, weights, top_k, temperature)
        logits = logits[:, :number] if want_logits else logits
    if indices is not None or not want_logits:
        return output.view(base_output.shape), None
    return output.view(base_output.shape), logits.reshape(*lead, number)
