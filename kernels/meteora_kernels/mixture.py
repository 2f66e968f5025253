"""The one entry point: checks, the choice of a backend, dispatch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meteora_kernels import dense, plan, reference
from meteora_kernels.operators import on_device_of

BACKENDS: tuple[str, ...] = ("auto", "reference", "dense", "triton")

_log = logging.getLogger(__name__)
_broken: dict[str, str] = {}
"""Devices on which the Triton backend failed to start, and why; ``auto`` leaves it alone there."""


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def pick_backend(x: Tensor, adapters: int, total_rank: int, top_k: int, *, training: bool) -> tuple[str, str]:
    """What ``auto`` picks for these tokens, and why (one phrase).

    Args:
        x: (..., h).
        adapters: N.
        total_rank: R.
        top_k: k.
        training: Gradients are wanted.
    """
    device = x.device.type
    if str(x.device) in _broken:
        return "dense", f"the GPU kernels failed on this device before ({_broken[str(x.device)]})"
    capability = _capability(x.device) if device == "cuda" else 0
    return plan.choose(plan.Case(x.numel() // max(x.shape[-1], 1), adapters, total_rank, top_k, x.dtype, device, capability, training))


def _implementation(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if backend == "triton":
        from meteora_kernels import triton_backend

        return triton_backend.lora_mixture
    return dense.lora_mixture if backend == "dense" else reference.lora_mixture


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
    max_rank: int | None = None,
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
        max_rank: The largest rank, if known; otherwise it is read off ``offsets`` once (a GPU waits for that; compiled code multiplies all
            adapters instead).

    Returns:
        (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair with the logits.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, top_k or temperature are out of range, unknown backend or one that cannot run
            here, or logits are asked for together with ``routes``.
    """
    check(x, base_output, gate, lora_A, lora_B, scaling, offsets, top_k, temperature, backend)
    if return_logits and routes is not None:
        raise ValueError("return_logits with given routes: the gate is not evaluated then")
    automatic = backend == "auto"
    if automatic:
        backend, _ = pick_backend(x, gate.shape[0], lora_A.shape[0], top_k, training=torch.is_grad_enabled())
    elif backend == "triton":
        reason = plan.why_not_triton(x.device.type, x.dtype)
        if reason is not None:
            raise ValueError(f"the triton backend cannot run here: {reason}")
    if backend == "triton" and routes is not None and routes[1].requires_grad:
        backend = "dense"  # the kernels give given weights no gradient
    if backend == "dense" and torch.compiler.is_compiling():
        backend = "reference"  # the same numbers; plain operators are what a compiler can trace and fuse
    options: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "lora_x": lora_x, "routes": routes, "allowed": allowed}
    arguments = (x, base_output, gate, lora_A, lora_B, scaling, offsets)
    if backend != "triton":
        output, logits = _implementation(backend)(*arguments, **options)
    else:
        with on_device_of(x):
            if automatic and not torch.compiler.is_compiling():
                output, logits = _triton_or_dense(arguments, options, max_rank, return_logits)
            else:
                output, logits = _implementation("triton")(*arguments, **options, max_rank=max_rank, want_logits=return_logits)
    if return_logits:
        assert logits is not None
        return output, logits
    return output


def _triton_or_dense(arguments: tuple[Tensor, ...], options: dict[str, Any], max_rank: int | None, want_logits: bool) -> tuple[Tensor, Tensor | None]:
    """The Triton backend; where it cannot be built (a kernel does not fit the GPU, no compiler), the dense one from then on."""
    try:
        return _implementation("triton")(*arguments, **options, max_rank=max_rank, want_logits=want_logits)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        device, reason = str(arguments[0].device), str(error).splitlines()[0] if str(error) else type(error).__name__
        _broken[device] = reason
        _log.warning("GPU kernels cannot run on %s (%s); the dense backend runs instead", device, reason)
        return dense.lora_mixture(*arguments, **options)


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
    device = x.device
    if not (base_output.device == gate.device == lora_A.device == lora_B.device == scaling.device == offsets.device == device):
        devices = {tensor.device for tensor in (x, base_output, gate, lora_A, lora_B, scaling, offsets)}
        raise ValueError(f"tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
    if not (gate.dtype == lora_A.dtype == lora_B.dtype == x.dtype) and not torch.is_autocast_enabled(device.type):
        names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x, gate, lora_A, lora_B))
        raise ValueError(f"x, gate, lora_A and lora_B have the dtypes {names}; they must be one")
