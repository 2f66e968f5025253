# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The root-mean-square norm of Llama and similar models in one launch, written directly into the input buffer of the next linears."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launches import Launches, Rest
from meteora_kernels.operators import on_device_of
from meteora_kernels.sizes import power_of_two

MOST_COLUMNS = 16384
"""The largest h, because a row must fit into the registers of one program."""


@triton.jit
def rms_norm_kernel(x, weight, out, hidden, stride_x, stride_out, epsilon, BLOCK: tl.constexpr):
    """out[t] = weight * round(x[t] / sqrt(mean(x[t]^2) + epsilon)), with sums in float32; ``round`` is to the dtype of x.

    x (M, h) and out (M, h), columns contiguous; weight (h,). The formula is that of RMSNorm (Zhang and Sennrich, arXiv 1910.07467), rounded where
    transformers' LlamaRMSNorm rounds. Grid: (M,).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden
    values = tl.load(x + token * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / hidden + epsilon)
    rounded = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + token * stride_out + columns, (rounded * factors.to(tl.float32)).to(out.dtype.element_ty), mask=mask)


_launches = Launches(rms_norm_kernel)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """Write the normalised, weighted rows of ``x`` into ``out``.

    Args:
        x: Input (..., h), columns contiguous, all rows at the same distance, h up to :data:`MOST_COLUMNS`.
        weight: Weights (h,), contiguous, in the dtype of x.
        epsilon: Summand of the mean square.
        out: Output of the shape and dtype of x, columns contiguous, all rows at the same distance.
    """
    shape, stride, stride_out = x.shape, x.stride(-2), out.stride(-2)

    def rest() -> Rest:
        block = power_of_two(shape[-1])
        return Rest((shape[:-1].numel(),), (shape[-1], stride, stride_out, epsilon), {"BLOCK": block, "num_warps": max(1, min(8, block // 512))})

    if x.numel():
        with on_device_of(x):
            _launches((shape, stride, stride_out, epsilon, x.dtype), (x, weight, out), rest)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same in plain PyTorch, for x (..., h), in the dtype of x."""
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
