"""Adds a layer's adapters to the output of its base layer, with the options of every token in steps that need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_core.integrations.vllm.eight_bits import EightBitBase
from meteora_core.integrations.vllm.layout import Block
from meteora_core.integrations.vllm.runtime import Runtime
from meteora_kernels import Adapters, Routing, mix
from meteora_kernels.reference import routing_weights, top_indices
from meteora_kernels.stacked import gate_rows_of

Base = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer, as the operators see it.

    Attributes:
        block: The memory of the layer.
        sums: Whether gate logits must be summed over the processes of a tensor-parallel group.
        routing: The routing of a plain step.
        kernels: Whether the GPU kernels are used.
        runtime: The state of the process.
        base: The function that computes the base layer's output (M, O) from x (M, h) and the bias (O,) or None, if an operator calls it.
        eight: The base layer, if it has 8-bit weights and an operator computes it from an input that is quantised already.
    """

    block: Block
    sums: bool
    routing: Routing
    kernels: bool
    runtime: Runtime
    base: Base | None = None
    eight: EightBitBase | None = None


def fresh(parts: list[Tensor], y: Tensor) -> Tensor:
    """The members' outputs, concatenated in new memory, because an operator must not return its input."""
    if len(parts) > 1:
        return torch.cat(parts, dim=1)
    return parts[0].clone() if parts[0].data_ptr() == y.data_ptr() else parts[0]


def mixed(x: Tensor, y: Tensor, adapters: Adapters, routing: Routing) -> Tensor:
    """``y`` plus the adapters of one member."""
    found = mix(x, y, adapters, routing)
    assert isinstance(found, Tensor)
    return found


def chosen_down(layer: Layer, x: Tensor) -> Tensor:
    """``A x`` of all members (M, members * R), scaled by the route of its token, by GPU kernels: one product with all gates and A, and one launch that routes.
    Both are independent of the base output."""
    from meteora_kernels.steps.middle import middle
    from meteora_kernels.steps.products import library_products

    adapters, block = layer.block.adapters, layer.block
    found = library_products(x, block.rows, 1)  # float32: rounded gate logits would choose other adapters
    down = found[..., gate_rows_of(adapters.number) :]
    logits = summed(found[0, :, : adapters.number]) if layer.sums else found
    return middle(logits, down, adapters, layer.routing, max_rank=adapters.max_rank or 0, dtype=x.dtype)


def added(layer: Layer, down: Tensor, y: Tensor) -> Tensor:
    """A new tensor with ``y`` plus B of all members times the result of :func:`chosen_down`, in one launch."""
    from meteora_kernels.steps.up import up

    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    up(down, layer.block.adapters, y if y.stride(1) == 1 else y.contiguous(), out)
    return out


def summed_logits(x: Tensor, adapters: Adapters | None) -> Tensor:
    """Gate logits, float32 (M, N), summed over the processes of the tensor-parallel group."""
    assert adapters is not None
    return summed(gate_logits(x, adapters.gate).float())


def summed(logits: Tensor) -> Tensor:
    """The sum of the float32 logits (M, N) of all processes of the tensor-parallel group."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(logits.contiguous())


def gate_logits(x: Tensor, gate: Tensor) -> Tensor:
    """Gate logits (M, N), not rounded to 16 bits on a GPU."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, gate.t(), out_dtype=torch.float32)
    return torch.mm(x, gate.t())


def observed(layer: Layer, x: Tensor, y: Tensor, logits: Tensor | None = None) -> Tensor:
    """``y`` plus the adapters, with the options of every token; the routes are recorded.

    Args:
        layer: The layer.
        x: Input (M, h).
        y: Base output (M, O).
        logits: Gate logits (M, N) of the first member; None to compute them.
    """
    runtime, shape = layer.runtime, layer.block.shape
    parts, found = torch.split(y, list(shape.widths), dim=1), []
    for path, part, adapters in zip(shape.paths, parts, layer.block.single, strict=True):
        if path is None or adapters is None:
            found.append(part)
            continue
        if logits is None:
            logits = summed_logits(x, adapters) if layer.sums else gate_logits(x, adapters.gate)
        indices, weights = routes_of(layer, logits)
        if runtime.observed:
            runtime.record(path, indices, weights)
        found.append(mixed(x, part.contiguous(), adapters, Routing(indices.shape[1], 1.0, None, indices, weights)))
        logits = None
    return fresh(found, y)


def routes_of(layer: Layer, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices int64 and weights float32 (M, k) for gate logits (M, N), by the options of every token; slots past a token's top_k have weight 0."""
    runtime = layer.runtime
    if not runtime.observed:
        top_k, temperature = layer.routing.top_k, layer.routing.temperature
        indices = top_indices(logits, top_k)
        return indices, routing_weights(logits.gather(1, indices).float(), temperature)
    tokens = runtime.tokens(logits.shape[0], logits.device)
    if tokens.allowed is not None:
        logits = logits.masked_fill(~tokens.allowed, float("-inf"))
    indices = top_indices(logits, tokens.most)
    slots = torch.arange(tokens.most, device=logits.device)
    chosen = logits.gather(1, indices).float().masked_fill(slots >= tokens.top_k.clamp(min=1)[:, None], float("-inf"))
    return indices, routing_weights(chosen, tokens.temperature[:, None]).masked_fill((tokens.top_k == 0)[:, None], 0.0)
