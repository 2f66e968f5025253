"""The entry point of the package: checks the arguments, chooses a backend and calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from meteora_kernels import dense, plan, reference
from meteora_kernels.operators import on_device_of
from meteora_kernels.plan import machine
from meteora_kernels.types import TEMPERATURES, Adapters, Routing

BACKENDS: tuple[str, ...] = ("auto", "reference", "dense", "triton")

_log = logging.getLogger(__name__)
_broken: dict[str, str] = {}
"""Devices on which the Triton backend failed to start, with the reason; ``auto`` does not choose it there again."""


def pick_backend(x: Tensor, adapters: int, total_rank: int, top_k: int, *, training: bool) -> tuple[str, str]:
    """The backend that ``auto`` picks for these tokens, and the reason as one phrase.

    Args:
        x: Input of the layer (..., h).
        adapters: Number of adapters N.
        total_rank: Sum of the adapters' ranks R.
        top_k: Number of adapters per token k.
        training: Whether gradients are needed.

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
    """The signature of a backend's function; the arguments are those of :func:`mix`."""

    def __call__(self, x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


def _triton() -> Any:
    """The Triton backend, which cannot be imported without Triton."""
    from meteora_kernels import layer

    return layer


class Options(TypedDict, total=False):
    """Keyword options of :func:`lora_mixture`.

    Attributes:
        top_k: Number of adapters per token, 1 <= top_k <= N; 2 by default.
        temperature: Routing temperature T > 0, which divides the chosen logits before the softmax; 1.0 by default.
        lora_x: Input of the adapters (..., h) where it differs from ``x`` (after dropout).
        routes: Indices int64 (..., k) and weights (..., k) to use instead of the gate's choice (forced routing).
        allowed: Mask of the adapters that may be chosen, bool (N,); all by default.
        backend: One of :data:`BACKENDS`; "auto" by default.
        return_logits: Whether to return the gate logits (..., N) too.
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
    """Add the routed mixture of N LoRA adapters to the output of a linear layer, from separate tensors. :func:`mix` takes them as values that are made once.

    Args:
        x: Input of the layer (..., h).
        base_output: ``W x`` plus bias (..., o).
        gate: Gate weights (N, h).
        lora_A: A of all adapters stacked by rows (R, h), where R is the sum of the ranks. An adapter of rank 0 adds nothing.
        lora_B: B of all adapters (R, o); row ``j`` is column ``j`` of the usual (o, R) matrix.
        scaling: Scaling of every adapter, float (N,): alpha / r, or alpha / sqrt(r) with rsLoRA.
        offsets: Row ranges of the adapters, int64 (N + 1,): adapter ``i`` owns rows ``offsets[i]:offsets[i+1]`` of A and B.
        **options: The fields of :class:`Options`.

    Returns:
        The output (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair of the output and the gate logits.

    Raises:
        ValueError: The conditions are those of :func:`mix`.
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
        x: Input of the layer (..., h), which the gate reads.
        base_output: ``W x`` plus bias (..., o).
        adapters: The adapters of one linear. If ``max_rank`` is None, it is computed from ``offsets`` once, which makes the host wait for the GPU;
            compiled code multiplies all adapters instead.
        routing: How tokens choose their adapters. Given routes replace the gate.
        lora_x: Input of the adapters (..., h) where it differs from ``x`` (after dropout).
        backend: One of :data:`BACKENDS`; ``auto`` chooses one that can run on this device.
        return_logits: Whether to return the gate logits (..., N) too.

    Returns:
        The output (..., o) in the dtype of ``base_output``; with ``return_logits`` a pair of the output and the gate logits.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; ``top_k`` or ``temperature`` is out of range; ``backend`` is unknown or cannot run on
            this device; or logits are requested together with given routes.

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


def mix_over(x: Tensor, product: Callable[[Tensor], Tensor], adapters: Adapters, routing: Routing, *, backend: str = "auto") -> Tensor:
    """:func:`mix` for a base output that a function computes, such as the product with a quantised weight.

    The Triton kernels of the adapters that do not need the base output run at the same time as the function, while a CUDA graph is captured for inference.

    Args:
        x: Input of the layer (..., h), which the gate reads.
        product: Function that computes ``W x`` plus bias (..., o) from x, in a new tensor, which may be overwritten.
        adapters: The adapters of one linear.
        routing: How tokens choose their adapters.
        backend: One of :data:`BACKENDS`.

    Returns:
        The output (..., o) in the dtype of the base output.

    Raises:
        ValueError: The conditions are those of :func:`mix`.

    Example:
        >>> linear = torch.nn.Linear(16, 8)
        >>> adapters = Adapters.of_layer(torch.randn(3, 16), torch.randn(12, 16), torch.randn(12, 8), torch.ones(3), torch.tensor([0, 4, 8, 12]), 4)
        >>> mix_over(torch.randn(5, 16), linear, adapters, Routing()).shape
        torch.Size([5, 8])
    """
    if _can_overlap(x, adapters, routing, backend):
        with on_device_of(x):
            return _triton().mix_over(x, product, adapters, routing)
    mixed = mix(x, product(x), adapters, routing, backend=backend)
    assert isinstance(mixed, Tensor)
    return mixed


def _can_overlap(x: Tensor, adapters: Adapters, routing: Routing, backend: str) -> bool:
    """Whether work of the Triton backend can run beside the base's product: for inference, while a CUDA graph is captured."""
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return False
    if torch.is_grad_enabled() or routing.indices is not None or adapters.max_rank is None or not adapters.lora_A.numel() or not x.numel():
        return False
    if torch.is_autocast_enabled("cuda") or not x.dtype == adapters.gate.dtype == adapters.lora_A.dtype == adapters.lora_B.dtype:
        return False
    if backend == "auto":
        backend, _ = pick_backend(x, adapters.number, adapters.total_rank, routing.top_k, training=False)
    return backend == "triton"


def _triton_or_dense(
    x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None, *, want_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """The Triton backend; if it cannot be built (a kernel does not fit the GPU, or there is no compiler), the dense backend from then on."""
    try:
        output, logits = _triton().mix(x, base_output, adapters, routing, lora_x, want_logits=want_logits)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("torch."):  # not a failure: PyTorch ends the recomputation of a checkpoint by an exception
            raise
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
    if not TEMPERATURES[0] <= routing.temperature <= TEMPERATURES[1]:
        raise ValueError(f"temperature is {routing.temperature}, it must be in {TEMPERATURES[0]:.3g}..{TEMPERATURES[1]:.2g}")
    device = x.device
    if not (base_output.device == gate.device == lora_A.device == lora_B.device == scaling.device == offsets.device == device):
        devices = {tensor.device for tensor in (x, base_output, gate, lora_A, lora_B, scaling, offsets)}
        raise ValueError(f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    if not (gate.dtype == lora_A.dtype == lora_B.dtype == x.dtype) and not torch.is_autocast_enabled(device.type):
        names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x, gate, lora_A, lora_B))
        raise ValueError(f"x, gate, lora_A and lora_B have the dtypes {names}; they must be one")
