# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""``x rows^T`` as float32 partial sums, for fused groups: the sum over x's columns is cut into one or more pieces, and none is rounded.

Every program owns a tile of the result and one piece of the sum and stores it; who reads the result adds the pieces in a fixed order
(:func:`meteora_kernels.triton_route.summed`), so there are no atomics, no launch for the addition, and logits are never rounded to 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div


@triton.jit
def products_kernel(
    x,
    rows,
    out,
    tokens_total,
    rows_total,
    hidden,
    span,
    stride_x,
    stride_rows,
    stride_split,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[s, t, r] = sum over the s-th ``span`` columns c of x[t, c] rows[r, c].

    x (M, h) and rows (P, h) in one dtype, columns contiguous; out float32 (S, M, P); span a multiple of BLOCK_K. EVEN: no piece is cut
    short by h.
    Grid: (ceil(P / BLOCK_N), ceil(M / BLOCK_M), S); programs of one x tile are neighbours, so it comes from memory once.
    """
    row_tile = tl.program_id(0)
    split = tl.program_id(2)
    tokens = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    steps = tl.arange(0, BLOCK_K)
    begin = split * span
    # Tiles that stick out read the first tokens or rows again: their sums are not stored.
    left = x + (tokens % tokens_total) * stride_x + begin + steps[None, :]
    right = rows + (columns % rows_total).to(tl.int64) * stride_rows + begin + steps[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(tl.cdiv(span, BLOCK_K)):
        if EVEN:
            values = tl.load(left)
            factors = tl.load(right)
        else:
            inside = begin + step * BLOCK_K + steps < hidden
            values = tl.load(left, mask=inside[None, :], other=0.0)
            factors = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(values, factors, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    place = out + tl.full([], split, tl.int64) * stride_split + tokens * stride_out + columns
    tl.store(place, total, mask=(tokens < tokens_total) & (columns < rows_total))


def products(x: Tensor, rows: Tensor, splits: int, tile: tuple[int, int, int, int, int]) -> Tensor:
    """``x rows^T`` in at most ``splits`` float32 pieces, whose sum is the product.

    Args:
        x: (M, h), columns contiguous, M >= 1.
        rows: (P, h), columns contiguous, the dtype of x.
        splits: Pieces of the sum; fewer come back where h has fewer blocks.
        tile: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.

    Returns:
        float32 (S, M, P), contiguous.
    """
    tokens, hidden = x.shape
    block_m, block_n, block_k, warps, stages = tile
    span = ceil_div(ceil_div(hidden, splits), block_k) * block_k
    pieces = ceil_div(hidden, span)
    out = torch.empty(pieces, tokens, rows.shape[0], dtype=torch.float32, device=x.device)
    products_kernel[(ceil_div(rows.shape[0], block_n), ceil_div(tokens, block_m), pieces)](
        x,
        rows,
        out,
        tokens,
        rows.shape[0],
        hidden,
        span,
        x.stride(0),
        rows.stride(0),
        out.stride(0),
        out.stride(1),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=pieces * span == hidden,
        PRECISION="ieee",
        num_warps=warps,
        num_stages=stages,
    )
    return out


def library_products(x: Tensor, rows: Tensor, splits: int) -> Tensor:
    """The same by one batched GEMM of the library: piece s is the s-th matrix of the batch.

    Args:
        x: (M, h), columns contiguous.
        rows: (P, h), columns contiguous, the dtype of x.
        splits: Pieces of the sum; 1 where they would not be equally long and 16 bytes aligned.

    Returns:
        float32 (S, M, P), contiguous.
    """
    hidden = x.shape[1]
    splits = 1 if hidden % (splits * 8) else splits
    left = x.unflatten(1, (splits, -1)).transpose(0, 1)
    right = rows.unflatten(1, (splits, -1)).permute(1, 2, 0)
    if x.dtype == torch.float32 or x.device.type != "cuda":
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)
