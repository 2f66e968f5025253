"""The one entry point: checks, the choice of a backend, dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meteora_kernels import dense, reference

BACKENDS: tuple[str, ...] = ("auto", "reference", "dense")

_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference.lora_mixture,
    "dense": dense.lora_mixture,
}


def pick_backend(x: Tensor, adapters: int, total_rank: int, top_k: int, *, training: bool) -> tuple[str, str]:
    """What ``auto`` picks for these tokens, and why (one phrase)."""
    if x.dtype == torch.float64:
        return "reference", "float64 input"
    return "dense", f"{adapters} adapters of total rank {total_rank} on {x.device.type}"


def lora_mixture(
    x: Tensor,
    base_output: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    *,
    top_k: int = 2,
    temperature: float = 1.0,
    lora_x: Tensor | None = None,
    routes: tuple[Tensor, Tensor] | None = None,
    allowed: Tensor | None = None,
    backend: str = "auto",
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the routed mixture of N LoRA adapters to the output of a linear layer (formulas in :mod:`meteora_kernels.reference`).

    Args:
        x: (..., h), the layer's input; the gate sees it as it is.
        base_output: (..., o), ``W x`` plus bias.
        gate: (N, h).
        lora_A: (R, h), all adapters' A stacked by rows; R = sum of ranks; an adapter may have rank 0 here (it adds nothing).
        lora_B: (R, o), row ``j`` is column ``j`` of the usual (o, R) matrix.
        scaling: float (N,), alpha / r (or alpha / sqrt(r)).
        offsets: int64 (N + 1,): adapter ``i`` owns rows ``offsets[i]:offsets[i+1]`` of A and B.
        top_k: Adapters per token, 1 <= top_k <= N.
        temperature: T > 0 of the softmax over the chosen adapters.
        lora_x: (..., h), what the adapters see when it is not ``x`` (after dropout).
        routes: (indices int64 (..., k), weights (..., k)) to use instead of the gate (forced routing).
        allowed: bool (N,), adapters that may be chosen.
        backend: One of :data:`BACKENDS`. A named one that cannot run here raises; ``auto`` chooses one that can.
        return_logits: Also return the gate logits (..., N).

    Returns:
        (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair with the logits.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, top_k or temperature are out of range, unknown backend, or logits are asked
            for together with ``routes``.
    """
    check(x, base_output, gate, lora_A, lora_B, scaling, offsets, top_k, temperature, backend)
    if return_logits and routes is not None:
        raise ValueError("return_logits with given routes: the gate is not evaluated then")
    if backend == "auto":
        backend, _ = pick_backend(x, gate.shape[0], lora_A.shape[0], top_k, training=torch.is_grad_enabled())
    output, logits = _IMPLEMENTATIONS[backend](
        x,
        base_output,
        gate,
        lora_A,
        lora_B,
        scaling,
        offsets,
        top_k=top_k,
        temperature=temperature,
        lora_x=lora_x,
        routes=routes,
        allowed=allowed,
    )
    if return_logits:
        assert logits is not None
        return output, logits
    return output


def check(
    x: Tensor,
    base_output: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    top_k: int,
    temperature: float,
    backend: str,
) -> None:
    """Raise ValueError unless the arguments of :func:`lora_mixture` fit each other."""
    adapters, hidden = gate.shape
    total, out = lora_B.shape
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if x.shape[-1] != hidden:
        raise ValueError(f"x has width {x.shape[-1]}, the gate wants {hidden}")
    if lora_A.shape != (total, hidden):
        raise ValueError(f"lora_A is {tuple(lora_A.shape)}, expected {(total, hidden)}")
    if base_output.shape != (*x.shape[:-1], out):
        raise ValueError(f"base_output is {tuple(base_output.shape)}, expected {(*x.shape[:-1], out)}")
    if scaling.shape != (adapters,) or offsets.shape != (adapters + 1,):
        raise ValueError(f"scaling {tuple(scaling.shape)} and offsets {tuple(offsets.shape)} do not fit {adapters} adapters")
    if not 1 <= top_k <= adapters:
        raise ValueError(f"top_k is {top_k}, but there are {adapters} adapters: it must lie in 1..{adapters}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    devices = {tensor.device for tensor in (x, base_output, gate, lora_A, lora_B, scaling, offsets)}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
