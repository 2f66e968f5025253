# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions that multiply rows of a matrix with tokens, and that find the member of a group to which outputs belong."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_times_tokens(
    w, rows, row_mask, x, tokens_total, length, stride_x, stride_w,
    BN: tl.constexpr, BK: tl.constexpr, TOKENS_P: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products float32 (BN, TOKENS_P) of the rows (BN, 1) of ``w`` (., length) and the tokens of ``x`` (M, length), M <= TOKENS_P.

    The row strides are ``stride_w`` and ``stride_x``. TOKENS_P is 1, or at least 16. EVEN: ``length`` is a multiple of BK. STAGES: Number of tiles of ``w``
    whose loads are in flight.
    """
    steps = tl.arange(0, BK)
    if TOKENS_P == 1:
        wide = tl.zeros([BN, BK], dtype=tl.float32)
        for start in tl.range(0, length, BK, num_stages=STAGES):
            if EVEN:
                weights = tl.load(w + rows * stride_w + start + steps[None, :], mask=row_mask, other=0.0, eviction_policy="evict_first")
                values = tl.load(x + start + steps)
            else:
                inside = start + steps < length
                weights = tl.load(w + rows * stride_w + start + steps[None, :], mask=row_mask & inside[None, :], other=0.0)
                values = tl.load(x + start + steps, mask=inside, other=0.0)
            wide += weights.to(tl.float32) * values.to(tl.float32)[None, :]
        total = tl.sum(wide, axis=1)[:, None]
    else:
        total = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
        tokens = tl.arange(0, TOKENS_P)[None, :]
        for start in tl.range(0, length, BK, num_stages=STAGES):
            if EVEN:
                weights = tl.load(w + rows * stride_w + start + steps[None, :], mask=row_mask, other=0.0, eviction_policy="evict_first")
                values = tl.load(x + tokens * stride_x + start + steps[:, None], mask=tokens < tokens_total, other=0.0)
            else:
                inside = start + steps < length
                weights = tl.load(w + rows * stride_w + start + steps[None, :], mask=row_mask & inside[None, :], other=0.0)
                values = tl.load(x + tokens * stride_x + start + steps[:, None], mask=(tokens < tokens_total) & inside[:, None], other=0.0)
            total = tl.dot(weights, values, total, input_precision=PRECISION)
    return total


@triton.jit
def member_of(tile, width0, width1, width2, BN: tl.constexpr, MEMBERS: tl.constexpr):
    """Locate the ``tile``-th block of BN outputs: its number within its member, the member, the number of outputs before that member, and its width."""
    member = tile * 0
    before = tile * 0
    width = before + width0
    if MEMBERS > 1:
        tiles0 = tl.cdiv(width0, BN)
        if tile >= tiles0:
            tile -= tiles0
            member += 1
            before += width0
            width = width * 0 + width1
            if MEMBERS > 2:
                tiles1 = tl.cdiv(width1, BN)
                if tile >= tiles1:
                    tile -= tiles1
                    member += 1
                    before += width1
                    width = width * 0 + width2
    return tile, member, before, width
