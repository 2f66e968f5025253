# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears for few tokens (decoding): every base weight and gate is read once, but only the chosen adapters' rows of A and B are read.

:func:`decode_chosen_rows_kernel` computes a whole group of linears that share their input in one launch, as :mod:`meteora_kernels.group.decode_all_rows` does
with all rows of A. The rows of A are not known before the gates, so there is a chain of four steps: gates, routing, chosen rows of A, chosen rows of B. The
chain should finish before the base weights have been read, which takes 12 us for 4096 x 4096. Therefore each step waits for memory only once: the sums over h
of gates and A are cut into pieces, one program per piece, and each program has all its loads in flight at once. A program that needs a whole sum adds the
pieces in a fixed order. Each program of A routes its token itself, which is faster than waiting for another program to do it. There are no floating-point
atomics, so two runs are bit-equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import choice_constants, chunk_of, or_any, span_of, three
from meteora_kernels.device.chosen_rows import add_chosen, add_without_gaps, picks_of_token, route_of_token, rows_without_gaps
from meteora_kernels.device.flags import finish, raise_flag, wait_flag
from meteora_kernels.device.rows import member_of, rows_times_tokens
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.types import WHOLE, Adapters, Form, Group, Routing

UP_TILE = (128, 2)
"""The number of chosen rows of B that are multiplied at a time where ranks do not fill their places, and the number of such steps in flight."""


@triton.jit
def decode_chosen_rows_kernel(
    x, w, gates_a, b, bias, allowed, scaling, offsets, chosen_out, logits, plan_rows, plan_values, plan_used, flags, y, tokens_total, hidden, stride_w, count,
    gate_rows, stacked, rank, width0, width1, width2, temperature,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, CHUNK: tl.constexpr, TOKENS_P: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_STEP: tl.constexpr, GATE_SPAN: tl.constexpr, GATE_PIECES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    DOWN_STEP: tl.constexpr, DOWN_SPAN: tl.constexpr, DOWN_PIECES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, BY_SLOT: tl.constexpr, ENTRIES: tl.constexpr,
    UP_STAGES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A group of up to three linears that share x, base and adapters, in one launch.

    Shapes: x, w, gates_a, b, bias, flags and y as in :mod:`meteora_kernels.group.decode_all_rows`.
    Scratch: logits float32 (GATE_PIECES, M, MEMBERS * count), partial sums; plan_rows int32 (M, MEMBERS * TOP_K * RANK_P), the chosen rows; plan_values
    float32 (DOWN_PIECES, M, MEMBERS * TOP_K * RANK_P), partial sums of A x times ``w_j s_j``.
    BY_SLOT: Every slot has RANK_P places. Otherwise, the rows of a slot follow those of the slot before, and plan_used int32 (MEMBERS, M) is the number of
    places that each token uses.
    EVEN: h is a multiple of BK, GATE_STEP and DOWN_STEP. WHOLE: h is a multiple of GATE_SPAN and DOWN_SPAN, the numbers of columns of a piece.
    Grid, one dimension: for each member ceil(count / GATE_BLOCK) * GATE_PIECES programs for the gates; then for each member M * BLOCKS * DOWN_PIECES programs
    for the chosen rows of A, ROWS rows at a time; then for each member ceil(width / BN) programs. No program waits for a later one.
    """
    pid = tl.program_id(0)
    PLACES: tl.constexpr = TOP_K * RANK_P
    gate_programs = tl.cdiv(count, GATE_BLOCK) * GATE_PIECES
    down_programs = tokens_total * (BLOCKS * DOWN_PIECES)
    stride_logits = MEMBERS * count
    stride_plan = MEMBERS * PLACES
    if pid < gate_programs * MEMBERS:
        member = pid // gate_programs
        piece = pid % GATE_PIECES
        local = (pid % gate_programs) // GATE_PIECES * GATE_BLOCK + tl.arange(0, GATE_BLOCK)[:, None]
        real = local < count
        begin = piece * GATE_SPAN
        length = GATE_SPAN if WHOLE else tl.minimum(hidden - begin, GATE_SPAN)
        gates = (member * stacked + local).to(tl.int64)
        sums = rows_times_tokens(
            gates_a + begin, gates, real, x + begin, tokens_total, length, hidden, stride_w, GATE_BLOCK, GATE_STEP, TOKENS_P, EVEN, STAGES, PRECISION
        )
        across = tl.arange(0, TOKENS_P)[None, :]
        place = (piece * tokens_total + across) * stride_logits + member * count + local
        tl.store(logits + place, sums, mask=real & (across < tokens_total))
        raise_flag(flags + member)
    elif pid < (gate_programs + down_programs) * MEMBERS:
        index = pid - gate_programs * MEMBERS
        member = index // down_programs
        token = (index % down_programs) // (BLOCKS * DOWN_PIECES)
        block = (index // DOWN_PIECES) % BLOCKS
        piece = index % DOWN_PIECES
        wait_flag(flags + member, gate_programs)
        here = logits + member * count
        routes = chosen_out + member * tokens_total * (2 * TOP_K)
        writes = (block == 0) & (piece == 0)
        start = piece * DOWN_SPAN
        some = DOWN_SPAN if WHOLE else tl.minimum(hidden - start, DOWN_SPAN)
        a = gates_a + (member * stacked + gate_rows).to(tl.int64) * stride_w + start
        values = x + token * hidden + start
        spot = token * stride_plan + member * PLACES
        rows_out = plan_rows + spot
        values_out = plan_values + piece * tokens_total * stride_plan + spot
        if BY_SLOT:
            places = block * ROWS + tl.arange(0, ROWS)[:, None]
            chosen, factors = route_of_token(
                here, stride_logits, stride_logits * tokens_total, token, places, allowed, scaling, offsets, routes, writes, count, temperature, TOP_K, SLOTS,
                PADDED, RANK_P, GATE_PIECES, HAS_ALLOWED, KEEP,
            )  # fmt: skip
            down = rows_times_tokens(a, chosen, chosen >= 0, values, 1, some, hidden, stride_w, ROWS, DOWN_STEP, 1, EVEN, STAGES, PRECISION)
            tl.store(values_out + places, factors * down, mask=places < PLACES)
            tl.store(rows_out + places, chosen.to(tl.int32), mask=(places < PLACES) & (piece == 0))
        else:
            picks, shares = picks_of_token(
                here, stride_logits, stride_logits * tokens_total, token, allowed, routes, writes, count, temperature, TOP_K, SLOTS, PADDED, GATE_PIECES,
                HAS_ALLOWED, KEEP,
            )  # fmt: skip
            live = tl.arange(0, SLOTS)[None, :] < TOP_K
            first = tl.load(offsets + picks).to(tl.int32)
            last = tl.load(offsets + picks + 1).to(tl.int32)
            scaled = shares * tl.load(scaling + picks)
            used = tl.sum(tl.where(live, last - first, 0))
            tl.store(plan_used + member * tokens_total + token, used, mask=writes)
            for begin in range(block * ROWS, used, BLOCKS * ROWS):
                places = begin + tl.arange(0, ROWS)[:, None]
                chosen, factors = rows_without_gaps(places, first, last, scaled, TOP_K, SLOTS)
                down = rows_times_tokens(a, chosen, chosen >= 0, values, 1, some, hidden, stride_w, ROWS, DOWN_STEP, 1, EVEN, STAGES, PRECISION)
                tl.store(values_out + places, factors * down, mask=places < used)
                tl.store(rows_out + places, chosen.to(tl.int32), mask=(places < used) & (piece == 0))
        raise_flag(flags + 3 + member)
    else:
        tile, member, before, width = member_of(pid - (gate_programs + down_programs) * MEMBERS, width0, width1, width2, BN, MEMBERS)
        columns = tile * BN + tl.arange(0, BN)[:, None]
        column_mask = columns < width
        rows = (before + columns).to(tl.int64)
        total = rows_times_tokens(w, rows, column_mask, x, tokens_total, hidden, hidden, stride_w, BN, BK, TOKENS_P, EVEN, STAGES, PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + before + columns, mask=column_mask, other=0.0).to(tl.float32)
        wait_flag(flags + 3 + member, down_programs)
        up = b + before.to(tl.int64) * rank
        rows_in = plan_rows + member * PLACES
        values_in = plan_values + member * PLACES
        split = tokens_total * stride_plan
        if BY_SLOT:
            total = add_chosen(
                total, up, width, columns, column_mask, rows_in, values_in, stride_plan, split, tokens_total, PLACES, CHUNK, TOKENS_P, DOWN_PIECES
            )
        else:
            total = add_without_gaps(
                total, up, width, columns, column_mask, rows_in, values_in, plan_used + member * tokens_total, stride_plan, split, tokens_total, ENTRIES,
                TOKENS_P, DOWN_PIECES, UP_STAGES, PRECISION,
            )  # fmt: skip
        tokens = tl.arange(0, TOKENS_P)[None, :]
        outputs = width0 + width1 + width2
        tl.store(y + tokens * outputs + before + columns, total.to(y.dtype.element_ty), mask=column_mask & (tokens < tokens_total))
    finish(flags, 6)


def fill_places(adapters: Adapters) -> bool:
    """Whether every adapter has as many rows as places are reserved for one, so that the places of all slots are in use."""
    return adapters.total_rank == adapters.number * adapters.rank_p


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    return None if case.tokens <= 16 else f"there are {case.tokens} tokens, the path takes up to 16"


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears for few tokens, reading only the chosen rows of A: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous, 1 <= M <= 16.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table, with ``pieces`` (the number of pieces of the sums over h, fewer where the steps do not allow that number) and a tile:
            ``gate_rows`` and ``gate_step`` are for the gates, ``down_rows`` and ``down_step`` for A, ``outputs`` and ``step`` for the base.
        form: Ignored by this path.
    """
    tile = row.tile
    assert tile is not None
    x = x.contiguous()
    tokens, hidden = x.shape
    adapters = group.adapters
    gate, _, b, scaling, offsets, _, widths, stacked = adapters
    count, members, rank_p, tokens_p = scaling.shape[0], len(widths), adapters.rank_p, 16
    places, bn, gate_block = routing.top_k * rank_p, tile.outputs, tile.gate_rows
    rows = min(tile.down_rows, power_of_two(places))
    gate_span, down_span = span_of(hidden, row.pieces, tile.gate_step), span_of(hidden, row.pieces, tile.down_step)
    gate_pieces, down_pieces = ceil_div(hidden, gate_span), ceil_div(hidden, down_span)
    logits = torch.empty(gate_pieces, tokens, members * count, dtype=torch.float32, device=x.device)
    plan_rows = torch.empty(tokens, members * places, dtype=torch.int32, device=x.device)
    plan_values = torch.empty(down_pieces, tokens, members * places, dtype=torch.float32, device=x.device)
    by_slot = fill_places(adapters)
    plan_used = plan_rows if by_slot else torch.empty(members, tokens, dtype=torch.int32, device=x.device)
    mean = ceil_div(routing.top_k * adapters.total_rank, count)
    blocks = ceil_div(places, rows) if by_slot else min(ceil_div(places, rows), ceil_div(mean, rows) + 1)
    y = torch.empty(tokens, sum(widths), dtype=x.dtype, device=x.device)
    programs = members * (ceil_div(count, gate_block) * gate_pieces + tokens * blocks * down_pieces)
    programs += sum(ceil_div(width, bn) for width in widths)
    decode_chosen_rows_kernel[(programs,)](
        x, group.weights, gate, b, or_any(group.bias, x), or_any(routing.allowed, x), scaling, offsets, or_any(routing.chosen, scaling), logits, plan_rows,
        plan_values, plan_used, group.flags, y, tokens, hidden, gate.stride(0), count, group.gate_rows, stacked, group.total_rank, *three(widths),
        routing.temperature, **choice_constants(adapters, routing), MEMBERS=members, RANK_P=rank_p, CHUNK=chunk_of(places, tokens_p, bn), TOKENS_P=tokens_p,
        GATE_BLOCK=gate_block, GATE_STEP=tile.gate_step, GATE_SPAN=gate_span, GATE_PIECES=gate_pieces, ROWS=rows, BLOCKS=blocks, DOWN_STEP=tile.down_step,
        DOWN_SPAN=down_span, DOWN_PIECES=down_pieces, BN=bn, BK=tile.step, KEEP=routing.chosen is not None, HAS_BIAS=group.bias is not None,
        EVEN=not (hidden % tile.step or hidden % tile.gate_step or hidden % tile.down_step), WHOLE=hidden % gate_span == 0 and hidden % down_span == 0,
        BY_SLOT=by_slot, ENTRIES=UP_TILE[0], UP_STAGES=UP_TILE[1], STAGES=tile.stages, PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
