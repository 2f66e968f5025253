# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Rotary position embeddings of queries and keys in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.operators import on_device_of
from meteora_kernels.sizes import ceil_div, power_of_two

HEADS = 8
"""The number of heads that a program rotates."""


@triton.jit
def rotated(x, cos, sin, out, stride_head, out_head, heads, first, half, BH: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the heads from ``first`` on of one token: x (heads, 2 * half), cos and sin (2 * half,), out like x."""
    rows = first + tl.arange(0, BH)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < heads) & (columns < half)
    one = tl.load(x + rows * stride_head + columns, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(x + rows * stride_head + half + columns, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(2):
        factor = tl.load(cos + part * half + columns, mask=columns < half, other=0.0).to(tl.float32)
        other = tl.load(sin + part * half + columns, mask=columns < half, other=0.0).to(tl.float32)
        own, turned = (one, -two) if part == 0 else (two, one)
        tl.store(out + rows * out_head + part * half + columns, (own * factor + turned * other).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    query, key, cos, sin, query_out, key_out, query_token, query_head, key_token, key_head, cos_token, query_heads, key_heads, half,
    BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x * cos + [-x2, x1] * sin`` for the halves x1, x2 of every head, in float32 and rounded once.

    query (tokens, query_heads, 2 * half) and key (tokens, key_heads, 2 * half) by their strides; cos and sin (tokens, 2 * half); outputs contiguous. The
    formula is that of RoFormer (Su et al., arXiv 2104.09864). Grid: (tokens, ceil(query_heads / BH) + ceil(key_heads / BH)).
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.cdiv(query_heads, BH)
    cos += token * cos_token
    sin += token * cos_token
    if block < blocks:
        out = query_out + token * query_heads * 2 * half
        rotated(query + token * query_token, cos, sin, out, query_head, 2 * half, query_heads, block * BH, half, BH, BLOCK)
    else:
        out = key_out + token * key_heads * 2 * half
        rotated(key + token * key_token, cos, sin, out, key_head, 2 * half, key_heads, (block - blocks) * BH, half, BH, BLOCK)


def can_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether :func:`rotate` takes these tensors."""
    if query.ndim != 4 or key.ndim != 4 or cos.ndim != 3 or query.shape[0] != 1 or cos.shape != sin.shape or cos.shape[0] != 1:
        return False
    width = query.shape[3]
    if width % 2 or cos.shape[1:] != (query.shape[2], width) or key.shape[2:] != query.shape[2:] or cos.stride() != sin.stride():
        return False
    same = query.dtype == key.dtype == cos.dtype == sin.dtype and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return same and query.stride(3) == key.stride(3) == cos.stride(2) == 1


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with rotary position embeddings.

    Args:
        query: Queries (1, heads, tokens, width), columns contiguous.
        key: Keys (1, key heads, tokens, width), columns contiguous, in the dtype of the queries.
        cos, sin: Cosine and sine of the angles (1, tokens, width), in the same dtype.

    Returns:
        The rotated queries and keys, of the same shapes, contiguous by token.

    Example:
        >>> query, angles = torch.randn(1, 4, 3, 8, device="cuda"), torch.randn(1, 3, 8, device="cuda")  # doctest: +SKIP
        >>> rotate(query, query[:, :2], angles.cos(), angles.sin())[1].shape  # doctest: +SKIP
        torch.Size([1, 2, 3, 8])
    """
    _, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    outputs = [torch.empty(1, tokens, count, width, dtype=query.dtype, device=query.device) for count in (heads, key_heads)]
    if tokens:
        with on_device_of(query):
            rotary_kernel[(tokens, ceil_div(heads, HEADS) + ceil_div(key_heads, HEADS))](
                query, key, cos, sin, outputs[0], outputs[1], query.stride(2), query.stride(1), key.stride(2), key.stride(1), cos.stride(1), heads,
                key_heads, width // 2, BH=HEADS, BLOCK=power_of_two(width // 2), num_warps=2,
            )  # fmt: skip
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


def rotate_reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""

    def one(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return one(query), one(key)
