# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""``x rows^T`` as float32 partial sums, for fused groups: the sum over x's columns is cut into one or more pieces, which are not rounded.

Every program computes one piece of the sum for a tile of the result and stores it. The kernel that reads the result adds the pieces in a fixed order
(:func:`meteora_kernels.device.routing.summed`), so there are no atomics, there is no launch for the addition, and logits are never rounded to 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import or_any, span_of
from meteora_kernels.plan.table import Row
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.tile import Tile

COPY_TILE = (8, 1024)
"""The numbers of tokens and columns that a program copies."""


@triton.jit
def products_kernel(
    x, rows, out, copy, tokens_total, rows_total, hidden, span, pieces, stride_x, stride_rows, stride_split, stride_out, stride_copy,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, COPY_M: tl.constexpr,
    COPY_N: tl.constexpr,
):  # fmt: skip
    """out[s, t, r] = sum over the s-th ``span`` columns c of x[t, c] rows[r, c].

    x (M, h) and rows (P, h) in one dtype, columns contiguous; out float32 (S, M, P); span is a multiple of BLOCK_K. EVEN: h is a multiple of span.
    COPY_M > 0: x is also copied to ``copy`` (M, h).
    Grid, one dimension: ceil(P / BLOCK_N) * ceil(M / BLOCK_M) * S programs, in which those of one tile of x are neighbours, so that it is read from memory
    once; then ceil(h / COPY_N) * ceil(M / COPY_M) programs that copy at the same time.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows_total, BLOCK_N)
    token_tiles = tl.cdiv(tokens_total, BLOCK_M)
    multiplying = row_tiles * token_tiles * pieces
    if pid < multiplying:
        split = pid // (row_tiles * token_tiles)
        tokens = ((pid // row_tiles) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        columns = (pid % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        steps = tl.arange(0, BLOCK_K)
        begin = split * span
        # Tokens and rows past the end wrap around to the start; their sums are not stored.
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
    elif COPY_M > 0:
        across = tl.cdiv(hidden, COPY_N)
        index = pid - multiplying
        here = (index // across * COPY_M + tl.arange(0, COPY_M)).to(tl.int64)[:, None]
        places = (index % across) * COPY_N + tl.arange(0, COPY_N)[None, :]
        both = (here < tokens_total) & (places < hidden)
        tl.store(copy + here * stride_copy + places, tl.load(x + here * stride_x + places, mask=both), mask=both)


def products(x: Tensor, rows: Tensor, splits: int, tile: Tile, copy: Tensor | None = None) -> Tensor:
    """``x rows^T`` in at most ``splits`` float32 pieces, whose sum is the product.

    Args:
        x: Input (M, h), columns contiguous, M >= 1.
        rows: Weights (P, h), columns contiguous, in the dtype of x.
        splits: Largest number of pieces of the sum; there are fewer if h has fewer blocks.
        tile: Block sizes, of which ``tokens``, ``outputs``, ``step``, ``warps`` and ``stages`` are used.
        copy: Destination of a copy of x in the same launch (M, h), columns contiguous, in the dtype of x; None for no copy.

    Returns:
        Partial sums float32 (S, M, P), contiguous.
    """
    tokens, hidden = x.shape
    block_m, block_n, block_k, warps, stages = tile[:5]
    span = span_of(hidden, splits, block_k)
    pieces = ceil_div(hidden, span)
    out = torch.empty(pieces, tokens, rows.shape[0], dtype=torch.float32, device=x.device)
    copy_m, copy_n = (COPY_TILE[0], min(COPY_TILE[1], power_of_two(hidden))) if copy is not None else (0, 0)
    copying = ceil_div(tokens, copy_m) * ceil_div(hidden, copy_n) if copy is not None else 0
    products_kernel[(ceil_div(rows.shape[0], block_n) * ceil_div(tokens, block_m) * pieces + copying,)](
        x, rows, out, or_any(copy, x), tokens, rows.shape[0], hidden, span, pieces,
        x.stride(0), rows.stride(0), out.stride(0), out.stride(1), copy.stride(0) if copy is not None else 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=pieces * span == hidden, PRECISION="ieee", COPY_M=copy_m, COPY_N=copy_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def pieces_of(hidden: int, splits: int) -> int:
    """The number of pieces into which :func:`library_products` cuts the sum: ``splits``, or 1 if the pieces would not be equal and aligned to 16 bytes."""
    return 1 if hidden % (splits * 8) else splits


def right_of(rows: Tensor, splits: int) -> Tensor:
    """The right operand of :func:`library_products` for weights (P, h): a view (S, h / S, P)."""
    hidden, pieces = rows.shape[1], pieces_of(rows.shape[1], splits)
    return rows.as_strided((pieces, hidden // pieces, rows.shape[0]), (hidden // pieces, 1, rows.stride(0)))


def library_products(x: Tensor, rows: Tensor, splits: int, right: Tensor | None = None) -> Tensor:
    """:func:`products` by one batched GEMM of the library, in which each piece is a matrix of the batch.

    Args:
        x: Input (..., h), columns contiguous, all rows at the same distance.
        rows: Weights (P, h), columns contiguous, in the dtype of x.
        splits: Number of pieces of the sum; one piece is used if they would not have equal lengths and be aligned to 16 bytes.
        right: The result of :func:`right_of` for ``rows``, if the caller keeps it.

    Returns:
        Partial sums float32 (S, M, P), contiguous.
    """
    right = right_of(rows, splits) if right is None else right
    pieces, span = right.shape[:2]
    left = x.as_strided((pieces, x.shape[:-1].numel(), span), (span, x.stride(-2), 1))
    return bmm_float32(left, right)


def bmm_float32(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm`` of float16, bfloat16 or float32 with results in float32, which are not rounded to 16 bits."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)


def products_by(row: Row, x: Tensor, rows: Tensor) -> Tensor:
    """``x rows^T`` in the form that a row of the table asks for: (M, P) in the dtype of x, or float32 partial sums (S, M, P)."""
    if not row.pieces:
        return F.linear(x, rows)
    return library_products(x, rows, row.pieces) if row.tile is None else products(x, rows, row.pieces, row.tile)
