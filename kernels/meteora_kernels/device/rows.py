# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Rows of a matrix times tokens, and which rows belong to which member of a group."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_times_tokens(
    w, rows, row_mask, x, tokens_total, length, stride_x, stride_w,
    BN: tl.constexpr, BK: tl.constexpr, MP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 (BN, MP): the rows (BN, 1) of ``w`` (., length), ``stride_w`` apart, times the tokens of ``x`` (M, length), ``stride_x`` apart, M <= MP.

    MP = 1 or MP >= 16. EVEN: length is a multiple of BK. STAGES: tiles of w in flight.
    """
    steps = tl.arange(0, BK)
    if MP == 1:
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
        total = tl.zeros([BN, MP], dtype=tl.float32)
        tokens = tl.arange(0, MP)[None, :]
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
    """The ``tile``-th block of BN outputs of all members: its number within its member, the member, the outputs before that one, and its width."""
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
