# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Kernels that multiply each token with its chosen rows (A of the way "few", B of "few" and "sorted_down"), and gates. ``launch.py`` launches them.

Programs never wait for each other: a kernel reads only values that an earlier launch wrote, or programs that have all been counted as done. There are no
floating-point atomics, and every sum is added in a fixed order, so two runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meteora_kernels.device.chosen_rows import route_of_token
from meteora_kernels.device.routing import summed
from meteora_kernels.device.rows import member_of, rows_times_tokens


@triton.jit
def gates_kernel(
    x, gates, logits, tokens_total, hidden, count, stride_x, stride_gates, member_rows,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``logits[piece, t, member * N + n]``: the sum over the ``piece``-th SPAN columns of ``x[t] * gates[member * member_rows + n]``.

    SPAN is a multiple of BK. WHOLE: h is a multiple of SPAN. Grid, one dimension: ceil(N / BN) * MEMBERS * ceil(M / BM) * ceil(h / SPAN).
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(count, BN)
    token_tiles = tl.cdiv(tokens_total, BM)
    member = pid // row_tiles % MEMBERS
    piece = pid // (row_tiles * MEMBERS * token_tiles)
    tokens = (pid // (row_tiles * MEMBERS) % token_tiles * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns = pid % row_tiles * BN + tl.arange(0, BN)[None, :]
    steps = tl.arange(0, BK)
    begin = piece * SPAN
    # Rows past the end wrap around to the start; their sums are not stored.
    left = x + (tokens % tokens_total) * stride_x + begin + steps[None, :]
    right = gates + (member * member_rows + columns % count).to(tl.int64) * stride_gates + begin + steps[:, None]
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for step in range(SPAN // BK):
        if WHOLE:
            values = tl.load(left)
            factors = tl.load(right)
        else:
            inside = begin + step * BK + steps < hidden
            values = tl.load(left, mask=inside[None, :], other=0.0)
            factors = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(values, factors, total, input_precision=PRECISION)
        left += BK
        right += BK
    place = logits + (piece * tokens_total + tokens) * (MEMBERS * count) + member * count + columns
    tl.store(place, total, mask=(tokens < tokens_total) & (columns < count))


@triton.jit
def tokens_down_kernel(
    x, a, logits, allowed, scaling, offsets, chosen_out, rows_out, values_out, tokens_total, hidden, count, stride_x, stride_a, member_rows, temperature,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    SPAN: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Route one token and multiply it with ROWS of its chosen rows of A, over the ``piece``-th SPAN columns.

    Writes the rows to ``rows_out``, int32 (M, MEMBERS * TOP_K * RANK_P), with -1 for unused places, and ``A x`` times ``w_j s_j`` to ``values_out``,
    float32 (PIECES, M, MEMBERS * TOP_K * RANK_P).
    Grid, one dimension: PIECES * ceil(TOP_K * RANK_P / ROWS) * M * MEMBERS.
    """
    pid = tl.program_id(0)
    PLACES: tl.constexpr = TOP_K * RANK_P
    BLOCKS: tl.constexpr = (PLACES + ROWS - 1) // ROWS
    piece = pid % PIECES
    block = pid // PIECES % BLOCKS
    token = pid // (PIECES * BLOCKS) % tokens_total
    member = pid // (PIECES * BLOCKS) // tokens_total
    places = block * ROWS + tl.arange(0, ROWS)[:, None]
    stride_logits = MEMBERS * count
    chosen, factors = route_of_token(
        logits + member * count, stride_logits, stride_logits * tokens_total, token, places, allowed, scaling, offsets,
        chosen_out + member * tokens_total * (2 * TOP_K), (block == 0) & (piece == 0), count, temperature, TOP_K, SLOTS, PADDED, RANK_P, SPLITS, HAS_ALLOWED,
        KEEP,
    )  # fmt: skip
    own = a + (member * member_rows).to(tl.int64) * stride_a
    start = piece * SPAN
    length = SPAN if WHOLE else tl.minimum(hidden - start, SPAN)
    here = x + token.to(tl.int64) * stride_x + start
    down = rows_times_tokens(own + start, chosen, chosen >= 0, here, 1, length, hidden, stride_a, ROWS, BK, 1, EVEN, STAGES, "ieee")
    spot = token * (MEMBERS * PLACES) + member * PLACES + places
    tl.store(values_out + piece * tokens_total * (MEMBERS * PLACES) + spot, factors * down, mask=places < PLACES)
    tl.store(rows_out + spot, chosen.to(tl.int32), mask=(places < PLACES) & (piece == 0))


@triton.jit
def base_tile(
    base, bias, tokens_total, stride_split, stride_base, width0, width1, width2,
    MEMBERS: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Where a program of a grid (sum of ceil(width / BN) over the members, ceil(M / BM)) writes, and base plus bias there, float32 (BM, BN).

    ``base`` are SPLITS partial sums (M, O) that are ``stride_split`` apart.
    Returns: the member, the number of outputs before it, its width; its tokens (BM, 1) and columns (1, BN), each followed by a mask; the sum.
    """
    tile, member, before, width = member_of(tl.program_id(0), width0, width1, width2, BN, MEMBERS)
    tokens = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns = tile * BN + tl.arange(0, BN)[None, :]
    live = tokens < tokens_total
    inside = columns < width
    total = summed(base, tokens * stride_base + before + columns, stride_split, live & inside, SPLITS)
    if HAS_BIAS:
        total += tl.load(bias + before + columns, mask=inside, other=0.0).to(tl.float32)
    return member, before, width, tokens, live, columns, inside, total


@triton.jit
def tokens_up_kernel(
    base, bias, b, rows_in, values_in, y, tokens_total, rank, stride_split, stride_base, stride_y, width0, width1, width2,
    MEMBERS: tl.constexpr, PLACES: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write base plus bias plus every token's chosen rows of B times their values to ``y``; :func:`tokens_down_kernel` wrote rows and values.

    ``base`` are SPLITS partial sums (M, O) that are ``stride_split`` apart. Grid: (sum of ceil(width / BN) over the members, ceil(M / BM)).
    """
    member, before, width, tokens, live, columns, inside, total = base_tile(
        base, bias, tokens_total, stride_split, stride_base, width0, width1, width2, MEMBERS, SPLITS, BM, BN, HAS_BIAS
    )
    up = b + before.to(tl.int64) * rank
    stride_plan = MEMBERS * PLACES
    for place in tl.range(0, PLACES, num_stages=1, loop_unroll_factor=8):
        spot = tokens * stride_plan + member * PLACES + place
        rows = tl.load(rows_in + spot, mask=live, other=-1)
        values = summed(values_in, spot, tokens_total * stride_plan, live, PIECES)
        chosen = tl.load(up + rows.to(tl.int64) * width + columns, mask=(rows >= 0) & inside, other=0.0)
        total += values * chosen.to(tl.float32)
    tl.store(y + tokens * stride_y + before + columns, total.to(y.dtype.element_ty), mask=live & inside)


@triton.jit
def routed_up_kernel(
    base, bias, b, picks, middle, offsets, y, tokens_total, rank, stride_split, stride_base, stride_y, width0, width1, width2,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, RANK_P: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """:func:`tokens_up_kernel` for routes and products that are stored slot by slot: picks int32 and middle float32 (MEMBERS * TOP_K, M, .), RANK_P values
    for each entry of ``picks``."""
    member, before, width, tokens, live, columns, inside, total = base_tile(
        base, bias, tokens_total, stride_split, stride_base, width0, width1, width2, MEMBERS, SPLITS, BM, BN, HAS_BIAS
    )
    up = b + before.to(tl.int64) * rank + columns
    for slot in tl.range(0, TOP_K, num_stages=1):
        entries = (member * TOP_K + slot).to(tl.int64) * tokens_total + tokens
        pick = tl.load(picks + entries, mask=live, other=0)
        first = tl.load(offsets + pick)
        last = tl.load(offsets + pick + 1)
        for row in tl.range(0, RANK_P, num_stages=1, loop_unroll_factor=8):
            values = tl.load(middle + entries * RANK_P + row, mask=live, other=0.0)
            chosen = tl.load(up + (first + row) * width, mask=live & (first + row < last) & inside, other=0.0)
            total += values * chosen.to(tl.float32)
    tl.store(y + tokens * stride_y + before + columns, total.to(y.dtype.element_ty), mask=live & inside)
