# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""``out = base + middle B`` for every member of a group in one launch, which can also compute the middle."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import choice_constants, or_any, three
from meteora_kernels.device.routing import coefficients_of, keep_routes, routes_of_tile, summed
from meteora_kernels.device.rows import member_of
from meteora_kernels.sizes import ceil_div
from meteora_kernels.types import Adapters, Routing

FEW_TILE, MANY_TILE = (16, 128, 32, 4, 3), (64, 128, 32, 4, 3)
"""Tokens, columns, rows of B for each step, warps and stages of a program, for up to 64 tokens and for more."""


@triton.jit
def up_kernel(
    middle, logits, allowed, scaling, offsets, chosen, b, base, out, tokens_total, count, rank, stride_split, stride_base_split, stride_middle, stride_logits,
    stride_base, stride_out, member_middle, member_logits, width0, width1, width2, temperature,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROUTE: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, PADDED: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr, HAS_BASE: tl.constexpr, SPLITS: tl.constexpr,
    BASE_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, c] = base[t, c] + sum_row middle[t, row] B[row, c] (without base where HAS_BASE is False).

    middle (M, .) and B have one dtype. Member i's columns of ``middle`` start at ``i * member_middle``; its B (R, width_i) is contiguous and follows
    those of the members before it, as do its columns of base and out. out may be base. With ROUTE, ``middle`` holds the unscaled ``A x``, and ``logits``
    (M, .) hold those of member i from column ``i * member_logits``; every program then routes its tokens itself. With SPLITS > 1, both are SPLITS float32
    partial sums that are ``stride_split`` apart; BASE_SPLITS is the number of partial sums of base. KEEP: the routes are written to ``chosen``.
    Grid: (sum_i ceil(width_i / BLOCK_N), ceil(M / BLOCK_M)).
    """
    tile, member, before, width = member_of(tl.program_id(0), width0, width1, width2, BLOCK_N, MEMBERS)
    tokens = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    token_mask = tokens < tokens_total
    column_mask = columns < width
    where = before + columns
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # Reading the base late is faster for large outputs, and a float32 sum loses less if the base, which is larger, is added last.
    LATE: tl.constexpr = not ROUTE or b.dtype.element_ty == tl.float32
    if HAS_BASE and not LATE:
        total += summed(base, tokens * stride_base + where, stride_base_split, token_mask & column_mask, BASE_SPLITS)
    if ROUTE:
        picks, shares = routes_of_tile(
            logits + member * member_logits, tokens, stride_logits, allowed, logits, logits, token_mask, count, temperature, TOP_K, SLOTS, PADDED,
            HAS_ALLOWED, False, stride_split, SPLITS,
        )  # fmt: skip
        first_tile = token_mask & (tile == 0)
        keep_routes(chosen + member * tokens_total * (2 * TOP_K), tokens, first_tile, picks, shares, TOP_K, SLOTS, KEEP)
        scaled = shares * tl.load(scaling + picks)
        first = tl.load(offsets + picks)
        last = tl.load(offsets + picks + 1)
    origin = b + before.to(tl.int64) * rank
    for start in range(0, rank, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        across = rows[None, :]
        if ROUTE:
            found = summed(middle + member * member_middle, tokens * stride_middle + across, stride_split, token_mask & (across < rank), SPLITS)
            factor = coefficients_of(across, picks, scaled, first, last, TOP_K, SLOTS)
            values = tl.where(factor == 0.0, 0.0, found * factor).to(b.dtype.element_ty)
        else:
            values = tl.load(middle + tokens * stride_middle + member * member_middle + across, mask=token_mask & (across < rank), other=0.0)
        up = tl.load(origin + rows[:, None].to(tl.int64) * width + columns, mask=(rows[:, None] < rank) & column_mask, other=0.0)
        total = tl.dot(values, up, total, input_precision=PRECISION)
    if HAS_BASE and LATE:
        total += summed(base, tokens * stride_base + where, stride_base_split, token_mask & column_mask, BASE_SPLITS)
    tl.store(out + tokens * stride_out + where, total.to(out.dtype.element_ty), mask=token_mask & column_mask)


def up(
    middle: Tensor,
    adapters: Adapters,
    base: Tensor | None,
    out: Tensor,
    *,
    logits: Tensor | None = None,
    routing: Routing | None = None,
    block_tokens: int | None = None,
) -> None:
    """Write ``base + middle B`` into ``out``.

    Args:
        middle: The middle (M, .), columns contiguous; the R columns of member i start at ``i * R``. With ``logits``, the unscaled ``A x`` (M, .), or
            float32 partial sums of it (S, M, .); the R columns of member i then start at ``i * member_rows``.
        adapters: The adapters; gates and A are not read. B has the dtype of ``middle``, unless ``middle`` consists of partial sums.
        base: Base output (M, O), columns contiguous, or partial sums of it (S, M, O), where O is the sum of the widths; None counts as 0.
        out: Output (M, O), columns contiguous; may be ``base``.
        logits: Gate logits (M, .), or as many partial sums as ``middle`` with the same stride. The logits of member i start at column
            ``i * member_rows``. With logits, every program routes its tokens itself; None if ``middle`` is final.
        routing: How tokens choose their adapters; needed with ``logits``.
        block_tokens: Number of tokens per program; None to choose it by the number of tokens.
    """
    tokens, rank = middle.shape[-2], adapters.total_rank
    block_m, block_n, block_k, warps, stages = FEW_TILE if tokens <= 64 else MANY_TILE
    block_m = block_tokens or block_m
    member_stride = rank if logits is None else adapters.member_rows
    choice = routing if routing is not None else Routing(top_k=1)
    grid = (sum(ceil_div(width, block_n) for width in adapters.widths), ceil_div(tokens, block_m))
    up_kernel[grid](
        middle, or_any(logits, middle), or_any(choice.allowed, middle), adapters.scaling, adapters.offsets,
        or_any(choice.chosen, adapters.scaling), adapters.lora_B, or_any(base, out), out, tokens, adapters.number, rank,
        middle.stride(0) if middle.dim() == 3 else 0, base.stride(0) if base is not None and base.dim() == 3 else 0, middle.stride(-2),
        or_any(logits, middle).stride(-2), base.stride(-2) if base is not None else 0, out.stride(0), member_stride, member_stride, *three(adapters.widths),
        choice.temperature, **choice_constants(adapters, choice), MEMBERS=adapters.members, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        ROUTE=logits is not None, KEEP=choice.chosen is not None, HAS_BASE=base is not None, SPLITS=middle.shape[0] if middle.dim() == 3 else 1,
        BASE_SPLITS=base.shape[0] if base is not None and base.dim() == 3 else 1, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
