# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""``silu(gate) * up`` in one launch, written directly into the input buffer of the next linear."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launches import Launches, Rest
from meteora_kernels.operators import on_device_of
from meteora_kernels.sizes import ceil_div


@triton.jit
def silu_mul_kernel(gate, up, out, width, stride_gate, stride_up, stride_out, BLOCK: tl.constexpr):
    """out[t, c] = round(gate[t, c] / (1 + exp(-gate[t, c]))) * up[t, c]; ``round`` is to the dtype of gate, as in PyTorch.

    gate, up and out (M, f) have contiguous columns and one dtype. The gated unit is SwiGLU's (Shazeer, arXiv 2002.05202). Grid: (M, ceil(f / BLOCK)).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(gate + token * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
    factors = tl.load(up + token * stride_up + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = (values / (1.0 + tl.exp(-values))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + token * stride_out + columns, (rounded * factors).to(out.dtype.element_ty), mask=mask)


BLOCK = 2048
"""The number of columns of a program."""

_launches = Launches(silu_mul_kernel)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write ``silu(gate) * up`` into ``out``; all three are (..., f), with contiguous columns, rows at the same distance, and one dtype."""
    shape, strides = gate.shape, (gate.stride(-2), up.stride(-2), out.stride(-2))

    def rest() -> Rest:
        return Rest((shape[:-1].numel(), ceil_div(shape[-1], BLOCK)), (shape[-1], *strides), {"BLOCK": BLOCK, "num_warps": 4})

    if gate.numel():
        with on_device_of(gate):
            _launches((shape, strides, gate.dtype), (gate, up, out), rest)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return F.silu(gate) * up
