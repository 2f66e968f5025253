# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Kernels of the ways "sorted" and "sorted_down", in which tokens are sorted by adapter and multiplied in blocks. ``launch.py`` launches them.

Programs never wait for each other: a kernel reads only values that an earlier launch wrote, or programs that have all been counted as done. There are no
floating-point atomics, and every sum is added in a fixed order, so two runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from meteora_kernels.device.routing import keep_routes, routes_of_tile, summed
from meteora_kernels.device.rows import member_of


@triton.jit
def routes_kernel(
    logits, allowed, scaling, chosen, picks_out, factors_out, tokens_total, count, stride_logits, stride_member, stride_split, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Write the adapters of every token to ``picks_out``, int32 (members, TOP_K, M), and ``w_j s_j`` to ``factors_out``, float32 of the same shape.

    ``logits`` are SPLITS partial sums (M, N) for each member; those of a member are ``stride_split`` apart, and members ``stride_member``.
    Grid: (ceil(M / BLOCK), members).
    """
    member = tl.program_id(1)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    mask = tokens < tokens_total
    here = logits + member.to(tl.int64) * stride_member
    picks, shares = routes_of_tile(
        here, tokens, stride_logits, allowed, here, here, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, False, stride_split, SPLITS
    )
    keep_routes(chosen + member * tokens_total * (2 * TOP_K), tokens, mask, picks, shares, TOP_K, SLOTS, KEEP)
    slots = tl.arange(0, SLOTS)[None, :]
    place = (member * TOP_K + slots) * tokens_total + tokens
    keep = mask & (slots < TOP_K)
    tl.store(picks_out + place, picks, mask=keep)
    tl.store(factors_out + place, shares * tl.load(scaling + picks), mask=keep)


@triton.jit
def _write_blocks(table, fields, group, adapter, less, same, first, last, most_blocks, SIZE: tl.constexpr):
    """Write one adapter's blocks of up to SIZE tokens: ``same`` tokens that follow ``less`` tokens of other adapters (see :func:`sort_kernel`)."""
    begin = less // SIZE + adapter
    here = table + group * most_blocks + begin
    for index in range((less + same) // SIZE + adapter + 1 - begin):
        tl.store(here + index, tl.where(index * SIZE < same, adapter, -1))
        tl.store(here + fields + index, less + index * SIZE)
        tl.store(here + 2 * fields + index, tl.minimum(less + index * SIZE + SIZE, less + same))
        tl.store(here + 3 * fields + index, first)
        tl.store(here + 4 * fields + index, last)
        tl.store(here + 5 * fields + index, 0)


@triton.jit
def sort_kernel(
    picks, offsets, order, table, short_table, tokens_total, groups, most_blocks, most_short,
    SIZE: tl.constexpr, SHORT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort the entries of one group by adapter (a stable counting sort), and cut each adapter's tokens into blocks of up to SIZE and up to SHORT.

    Shapes: picks int32 (G, M), G = members * slots; order int32 (G, M), token numbers; table int32 (6, G, most_blocks), with these fields for each block:
    its adapter (-1 for an unused block), its first place in ``order``, one past its last place, the adapter's first row, one past its last row, and a
    counter that starts at 0; short_table has the same fields. If S tokens chose adapters before adapter i, the blocks of adapter i start at number
    ``S // SIZE + i``. An adapter with c tokens needs ``ceil(c / SIZE)`` blocks, which is at most ``(S + c) // SIZE + 1 - S // SIZE``, so blocks never
    overlap and no program needs to know the number of blocks of the others. Grid: (N, G).
    """
    adapter = tl.program_id(0)
    group = tl.program_id(1)
    here = picks + group * tokens_total
    steps = tl.arange(0, CHUNK)
    less = 0
    same = 0
    for start in range(0, tokens_total, CHUNK):
        found = tl.load(here + start + steps, mask=start + steps < tokens_total, other=1 << 30)
        less += tl.sum((found < adapter).to(tl.int32), axis=0)
        same += tl.sum((found == adapter).to(tl.int32), axis=0)
    if same > 0:
        place = less
        for start in range(0, tokens_total, CHUNK):
            found = tl.load(here + start + steps, mask=start + steps < tokens_total, other=1 << 30)
            mine = (found == adapter).to(tl.int32)
            tl.store(order + group * tokens_total + place + tl.cumsum(mine, axis=0) - mine, start + steps, mask=mine == 1)
            place += tl.sum(mine, axis=0)
    first = tl.load(offsets + adapter).to(tl.int32)
    last = tl.load(offsets + adapter + 1).to(tl.int32)
    _write_blocks(table, groups * most_blocks, group, adapter, less, same, first, last, most_blocks, SIZE)
    if SHORT > 0:
        _write_blocks(short_table, groups * most_short, group, adapter, less, same, first, last, most_short, SHORT)


@triton.jit
def blocks_down_kernel(
    x, a, factors, order, table, parts, middle, tokens_total, entries_total, hidden, most_blocks, groups, stride_x, stride_a, member_rows,
    TOP_K: tl.constexpr, RANK_P: tl.constexpr, RANK_D: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``middle[group, entry, i] = w s (A x)_i`` for the entries of one block and the rows i of its adapter.

    There are E entries a group. Entry e is that of token ``e % M``: E is M if every slot is a group (TOP_K groups a member), and TOP_K * M if all slots of a
    member are one group (this TOP_K is then 1). factors float32 and order int32 (G, E); middle float32 (G, E, RANK_P). RANK_D is the larger of RANK_P and 16.
    With PIECES > 1 every program writes its sum over SPAN columns to ``parts``, float32 (PIECES, G * most_blocks, SIZE, RANK_D), and the last of a block's
    programs, counted in the table's last field, adds them in a fixed order.
    Grid, one dimension: PIECES * G * most_blocks.
    """
    pid = tl.program_id(0)
    piece = pid % PIECES
    block = pid // PIECES
    fields = groups * most_blocks
    if tl.load(table + block) >= 0:
        group = block // most_blocks
        places = tl.load(table + fields + block) + tl.arange(0, SIZE)
        live = places < tl.load(table + 2 * fields + block)
        first = tl.load(table + 3 * fields + block)
        inner = tl.arange(0, RANK_D)
        real = inner < tl.load(table + 4 * fields + block) - first
        entries = tl.load(order + group * entries_total + places, mask=live, other=0)
        rows = (group // TOP_K * member_rows).to(tl.int64) + first + inner
        steps = piece * SPAN + tl.arange(0, BK)
        left = x + (entries % tokens_total).to(tl.int64)[:, None] * stride_x + steps[None, :]
        right = a + rows[None, :] * stride_a + steps[:, None]
        total = tl.zeros([SIZE, RANK_D], dtype=tl.float32)
        for step in range(SPAN // BK):
            if WHOLE:
                values = tl.load(left, mask=live[:, None], other=0.0)
                down = tl.load(right, mask=real[None, :], other=0.0)
            else:
                inside = steps + step * BK < hidden
                values = tl.load(left, mask=live[:, None] & inside[None, :], other=0.0)
                down = tl.load(right, mask=real[None, :] & inside[:, None], other=0.0)
            total = tl.dot(values, down, total, input_precision=PRECISION)
            left += BK
            right += BK
        last = True
        if PIECES > 1:
            spots = tl.arange(0, SIZE)[:, None] * RANK_D + inner[None, :]
            here = parts + block.to(tl.int64) * (SIZE * RANK_D)
            split = fields.to(tl.int64) * (SIZE * RANK_D)
            tl.store(here + piece * split + spots, total)
            tl.debug_barrier()
            last = tl.atomic_add(table + 5 * fields + block, 1, sem="acq_rel", scope="gpu") == PIECES - 1
            tl.debug_barrier()
            if last:
                total = summed(here, spots, split, spots >= 0, PIECES, True)
        if last:
            factor = tl.load(factors + group * entries_total + entries, mask=live, other=0.0)
            goal = middle + (group * entries_total + entries.to(tl.int64)[:, None]) * RANK_P + inner[None, :]
            tl.store(goal, total * factor[:, None], mask=live[:, None] & (inner < RANK_P)[None, :])


@triton.jit
def blocks_up_kernel(
    middle, b, base, bias, out, order, table, tokens_total, rank, most_blocks, groups, stride_split, stride_base, stride_out, width0, width1, width2,
    SLOT: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr, RANK_P: tl.constexpr, RANK_D: tl.constexpr, BLOCK_R: tl.constexpr, SIZE: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``middle B`` of one slot for the tokens of one block and BN columns; there is one launch for each slot. middle float32 (G, M, RANK_P).

    The first slots store their sum in ``out``, in its dtype. The last slot adds base, bias, that sum and its product in float32, and rounds once.
    Grid: (most_blocks, sum of ceil(width / BN) over the members).
    """
    tile, member, before, width = member_of(tl.program_id(1), width0, width1, width2, BN, MEMBERS)
    group = member * TOP_K + SLOT
    block = group * most_blocks + tl.program_id(0)
    fields = groups * most_blocks
    if tl.load(table + block) >= 0:
        places = tl.load(table + fields + block) + tl.arange(0, SIZE)
        live = places < tl.load(table + 2 * fields + block)
        first = tl.load(table + 3 * fields + block)
        last = tl.load(table + 4 * fields + block)
        tokens = tl.load(order + group * tokens_total + places, mask=live, other=0).to(tl.int64)[:, None]
        columns = tile * BN + tl.arange(0, BN)[None, :]
        inside = columns < width
        mask = live[:, None] & inside
        up = b + before.to(tl.int64) * rank
        here = middle + (group * tokens_total + tokens) * RANK_P
        place = out + tokens * stride_out + before + columns
        total = tl.zeros([SIZE, BN], dtype=tl.float32)
        if SLOT > 0:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if SLOT == TOP_K - 1:
            total += summed(base, tokens * stride_base + before + columns, stride_split, mask, SPLITS)
            if HAS_BIAS:
                total += tl.load(bias + before + columns, mask=inside, other=0.0).to(tl.float32)
        for start in tl.static_range(0, RANK_D, BLOCK_R):
            inner = start + tl.arange(0, BLOCK_R)
            rows = (first + inner).to(tl.int64)
            known = live[:, None] & (inner < RANK_P)[None, :]
            left = tl.load(here + inner[None, :], mask=known, other=0.0)
            right = tl.load(up + rows[:, None] * width + columns, mask=(rows < last)[:, None] & inside, other=0.0)
            total = tl.dot(left.to(b.dtype.element_ty), right, total, input_precision=PRECISION)
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _token(order, place, end):
    """The token at a place of a block, and whether the block has one there."""
    return tl.load(order + place, mask=place < end, other=0).to(tl.int64), place < end


@triton.jit
def fours_up_kernel(
    middle, b, base, bias, out, order, table, tokens_total, rank, most_blocks, groups, stride_split, stride_base, stride_out, width0, width1, width2,
    SLOT: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr, RANK_P: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """:func:`blocks_up_kernel` for blocks of up to four tokens, without matrix units: B is read row by row."""
    tile, member, before, width = member_of(tl.program_id(1), width0, width1, width2, BN, MEMBERS)
    group = member * TOP_K + SLOT
    block = group * most_blocks + tl.program_id(0)
    fields = groups * most_blocks
    if tl.load(table + block) >= 0:
        begin = tl.load(table + fields + block)
        end = tl.load(table + 2 * fields + block)
        first = tl.load(table + 3 * fields + block)
        last = tl.load(table + 4 * fields + block)
        own = order + group * tokens_total
        token0, live0 = _token(own, begin, end)
        token1, live1 = _token(own, begin + 1, end)
        token2, live2 = _token(own, begin + 2, end)
        token3, live3 = _token(own, begin + 3, end)
        columns = tile * BN + tl.arange(0, BN)
        inside = columns < width
        up = b + before.to(tl.int64) * rank + columns
        here = middle + (group * tokens_total).to(tl.int64) * RANK_P
        goal = out + before + columns
        total0 = tl.zeros([BN], dtype=tl.float32)
        total1 = tl.zeros([BN], dtype=tl.float32)
        total2 = tl.zeros([BN], dtype=tl.float32)
        total3 = tl.zeros([BN], dtype=tl.float32)
        if SLOT > 0:
            total0 += tl.load(goal + token0 * stride_out, mask=inside & live0, other=0.0).to(tl.float32)
            total1 += tl.load(goal + token1 * stride_out, mask=inside & live1, other=0.0).to(tl.float32)
            total2 += tl.load(goal + token2 * stride_out, mask=inside & live2, other=0.0).to(tl.float32)
            total3 += tl.load(goal + token3 * stride_out, mask=inside & live3, other=0.0).to(tl.float32)
        if SLOT == TOP_K - 1:
            source = before + columns
            total0 += summed(base, token0 * stride_base + source, stride_split, inside & live0, SPLITS)
            total1 += summed(base, token1 * stride_base + source, stride_split, inside & live1, SPLITS)
            total2 += summed(base, token2 * stride_base + source, stride_split, inside & live2, SPLITS)
            total3 += summed(base, token3 * stride_base + source, stride_split, inside & live3, SPLITS)
            if HAS_BIAS:
                shift = tl.load(bias + before + columns, mask=inside, other=0.0).to(tl.float32)
                total0 += shift
                total1 += shift
                total2 += shift
                total3 += shift
        for row in tl.static_range(RANK_P):
            right = tl.load(up + (first + row).to(tl.int64) * width, mask=(first + row < last) & inside, other=0.0).to(tl.float32)
            total0 += tl.load(here + token0 * RANK_P + row, mask=live0, other=0.0) * right
            total1 += tl.load(here + token1 * RANK_P + row, mask=live1, other=0.0) * right
            total2 += tl.load(here + token2 * RANK_P + row, mask=live2, other=0.0) * right
            total3 += tl.load(here + token3 * RANK_P + row, mask=live3, other=0.0) * right
        tl.store(goal + token0 * stride_out, total0.to(out.dtype.element_ty), mask=inside)
        tl.store(goal + token1 * stride_out, total1.to(out.dtype.element_ty), mask=inside & live1)
        tl.store(goal + token2 * stride_out, total2.to(out.dtype.element_ty), mask=inside & live2)
        tl.store(goal + token3 * stride_out, total3.to(out.dtype.element_ty), mask=inside & live3)
