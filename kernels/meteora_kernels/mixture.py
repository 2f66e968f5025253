"""The one entry point: checks, the choice of a backend, dispatch."""

from __future__ import annotations

import logging
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from meteora_kernels import dense, plan, reference
from meteora_kernels.operators import on_device_of
from meteora_kernels.plan import machine
from meteora_kernels.types import Adapters, Routing

BACKENDS: tuple[str, ...] = ("auto", "reference", "dense", "triton")

_log = logging.getLogger(__name__)
_broken: dict[str, str] = {}
"""Devices on which the Triton backend failed to start, and why; ``auto`` leaves it alone there."""


def pick_backend(x: Tensor, adapters: int, total_rank: int, top_k: int, *, training: bool) -> tuple[str, str]:
    """What ``auto`` picks for these tokens, and why (one phrase).

    Args:
        x: (..., h).
        adapters: N.
        total_rank: R.
        top_k: k.
        training: Gradients are wanted.

    Example:
        >>> import torch
        >>> from meteora_kernels import pick_backend
        >>> backend, reason = pick_backend(torch.randn(5, 16), adapters=3, total_rank=16, top_k=2, training=False)
        >>> backend
        'dense'
    """
    device = x.device.type
    if str(x.device) in _broken:
        return "dense", f"the GPU kernels failed on this device before ({_broken[str(x.device)]})"
    capability = machine.capability(x.device) if device == "cuda" else 0
    return plan.choose_backend(plan.Call(x.numel() // max(x.shape[-1], 1), adapters, total_rank, top_k, x.dtype, device, capability, training))


class Backend(Protocol):
    """A backend's function; arguments as in :func:`mix`."""

    def __call__(self, x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


def _triton() -> Any:
    """The Triton backend, which cannot be imported without Triton."""
    from meteora_kernels import layer

    return layer


class Options(TypedDict, total=False):
    """What :func:`lora_mixture` takes by name.

    Attributes:
        top_k: Adapters per token, 1 <= top_k <= N; 2 if not given.
        temperature: T > 0 of the softmax over the chosen adapters; 1.0 if not given.
        lora_x: (..., h), what the adapters see when it is not ``x`` (after dropout).
        routes: (indices int64 (..., k), weights (..., k)) to use instead of the gate (forced routing).
        allowed: bool (N,), adapters that may be chosen.
        backend: One of :data:`BACKENDS`; "auto" if not given.
        return_logits: Also return the gate logits (..., N).
        max_rank: The largest rank, if known.
    """

    top_k: int
    temperature: float
    lora_x: Tensor | None
    routes: tuple[Tensor, Tensor] | None
    allowed: Tensor | None
    backend: str
    return_logits: bool
    max_rank: int | None


def lora_mixture(
    x: Tensor, base_output: Tensor, gate: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, offsets: Tensor, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the routed mixture of N LoRA adapters to the output of a linear layer, from tensors; :func:`mix` does the same from values made once.

    Args:
        x: (..., h), the layer's input.
        base_output: (..., o), ``W x`` plus bias.
        gate: (N, h).
        lora_A: (R, h), all adapters' A stacked by rows; R = sum of ranks; an adapter may have rank 0 here (it adds nothing).
        lora_B: (R, o), row ``j`` is column ``j`` of the usual (o, R) matrix.
        scaling: float (N,), alpha / r (or alpha / sqrt(r)).
        offsets: int64 (N + 1,): adapter ``i`` owns rows ``offsets[i]:offsets[i+1]`` of A and B.
        **options: :class:`Options`.

    Returns:
        (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair with the logits.

    Raises:
        ValueError: As in :func:`mix`.
        TypeError: An option is unknown.

    Example:
        >>> x, gate, A, B = torch.randn(5, 16), torch.randn(3, 16), torch.randn(12, 16), torch.randn(12, 8)
        >>> lora_mixture(x, torch.zeros(5, 8), gate, A, B, torch.ones(3), torch.tensor([0, 4, 8, 12]), top_k=1).shape
        torch.Size([5, 8])
    """
    rest: dict[str, Any] = {**options}
    adapters = Adapters.of_layer(gate, lora_A, lora_B, scaling, offsets, rest.pop("max_rank", None))
    indices, weights = rest.pop("routes", None) or (None, None)
    routing = Routing(rest.pop("top_k", 2), rest.pop("temperature", 1.0), rest.pop("allowed", None), indices, weights)
    return mix(x, base_output, adapters, routing, **rest)


def mix(
    x: Tensor,
    base_output: Tensor,
    adapters: Adapters,
    routing: Routing,
    *,
    lora_x: Tensor | None = None,
    backend: str = "auto",
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the routed mixture of N LoRA adapters to the output of a linear layer (formulas in :mod:`meteora_kernels.reference`).

    Args:
        x: (..., h), the layer's input; the gate sees it as it is.
        base_output: (..., o), ``W x`` plus bias.
        adapters: Of one linear. Where ``max_rank`` is None, it is read off ``offsets`` once (a GPU waits for that; compiled code multiplies all
            adapters instead).
        routing: How tokens choose. Given routes replace the gate.
        lora_x: (..., h), what the adapters see when it is not ``x`` (after dropout).
        backend: One of :data:`BACKENDS`. A named one that cannot run here raises; ``auto`` chooses one that can.
        return_logits: Also return the gate logits (..., N).

    Returns:
        (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair with the logits.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, top_k or temperature are out of range, unknown backend or one that cannot run
            here, or logits are asked for together with given routes.

    Example:
        >>> adapters = Adapters.of_layer(torch.randn(3, 16), torch.randn(12, 16), torch.randn(12, 8), torch.ones(3), torch.tensor([0, 4, 8, 12]))
        >>> mix(torch.randn(5, 16), torch.zeros(5, 8), adapters, Routing(top_k=2, temperature=1.0)).shape
        torch.Size([5, 8])
    """
    check(x, base_output, adapters, routing, backend)
    if return_logits and routing.indices is not None:
        raise ValueError("return_logits with given routes: the gate is not evaluated then")
    automatic = backend == "auto"
    if automatic:
        backend, _ = pick_backend(x, adapters.gate.shape[0], adapters.lora_A.shape[0], routing.top_k, training=torch.is_grad_enabled())
    elif backend == "triton":
        reason = plan.why_not_triton(x.device.type, x.dtype)
        if reason is not None:
            raise ValueError(f"the triton backend cannot run here: {reason}")
    if backend == "triton" and routing.weights is not None and routing.weights.requires_grad:
        backend = "dense"  # the Triton kernels do not differentiate routing weights that the caller gives
    if backend == "dense" and torch.compiler.is_compiling():
        backend = "reference"  # the same numbers; plain operators are what a compiler can trace and fuse
    if backend != "triton":
        run: Backend = dense.mix if backend == "dense" else reference.mix
        output, logits = run(x, base_output, adapters, routing, lora_x)
    else:
        with on_device_of(x):
            if automatic and not torch.compiler.is_compiling():
                output, logits = _triton_or_dense(x, base_output, adapters, routing, lora_x, want_logits=return_logits)
            else:
                output, logits = _triton().mix(x, base_output, adapters, routing, lora_x, want_logits=return_logits)
    if return_logits:
        assert logits is not None
        return output, logits
    return output


def _triton_or_dense(
    x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None, *, want_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """The Triton backend; where it cannot be built (a kernel does not fit the GPU, no compiler), the dense one from then on."""
    try:
        output, logits = _triton().mix(x, base_output, adapters, routing, lora_x, want_logits=want_logits)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        device, reason = str(x.device), str(error).splitlines()[0] if str(error) else type(error).__name__
        _broken[device] = reason
        _log.warning("GPU kernels cannot run on %s (%s); the dense backend runs instead", device, reason)
        return dense.mix(x, base_output, adapters, routing, lora_x)
    return output, logits


def check(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, backend: str) -> None:
    """Raise ValueError unless the arguments of :func:`mix` fit each other."""
    gate, lora_A, lora_B, scaling, offsets, _, _, _ = adapters
    count, hidden = gate.shape
    total, out = lora_B.shape
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if x.shape[-1] != hidden:
        raise ValueError(f"x has width {x.shape[-1]}, the gate wants {hidden}")
    if lora_A.shape != (total, hidden):
        raise ValueError(f"lora_A is {tuple(lora_A.shape)}, expected {(total, hidden)}")
    if base_output.shape != (*x.shape[:-1], out):
        raise ValueError(f"base_output is {tuple(base_output.shape)}, expected {(*x.shape[:-1], out)}")
    if scaling.shape != (count,) or offsets.shape != (count + 1,):
        raise ValueError(f"scaling {tuple(scaling.shape)} and offsets {tuple(offsets.shape)} do not fit {count} adapters")
    if not 1 <= routing.top_k <= count:
        raise ValueError(f"top_k is {routing.top_k}, but there are {count} adapters: it must be in 1..{count}")
    if not routing.temperature > 0:
        raise ValueError(f"temperature is {routing.temperature}, it must be above 0")
    device = x.device
    if not (base_output.device == gate.device == lora_A.device == lora_B.device == scaling.device == offsets.device == device):
        devices = {tensor.device for tensor in (x, base_output, gate, lora_A, lora_B, scaling, offsets)}
        raise ValueError(f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    if not (gate.dtype == lora_A.dtype == lora_B.dtype == x.dtype) and not torch.is_autocast_enabled(device.type):
        names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x, gate, lora_A, lora_B))
        raise ValueError(f"x, gate, lora_A and lora_B have the dtypes {names}; they must be one")
