# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears at few tokens (decoding): every base weight and every gate is read once, of A and B only the rows of the chosen adapters.

:func:`chosen_kernel` does a whole group of linears that share their input in ONE launch, as :func:`meteora_kernels.triton_decode.decode_kernel`
does with all rows of A. A cannot be read before the gates are known, so there is a chain: gates, routing, chosen rows of A, chosen rows of B.
It must be over before the base weights are, which take 12 us for 4096 x 4096. Hence every link takes one trip to the memory: the sums over h of
gates and of A are cut into pieces, each a program of its own that has its loads in flight at once, and whoever needs a whole sum adds its
pieces in their order. Each program of A routes its token itself, which is faster than to wait for another one's route. No floating-point
atomics: two runs are bit-equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two
from meteora_kernels.triton_decode import add_chosen, chunk_of, member_of, rows_times_tokens
from meteora_kernels.triton_route import bounded_logits, top_of_tile
from meteora_kernels.triton_sync import finish, raise_flag, wait_flag


class Tile(NamedTuple):
    """How the work of :func:`chosen_kernel` is cut.

    Attributes:
        pieces: The sums over h of gates and A are cut into so many, as far as their steps allow.
        gate_rows, gate_step: Rows of G a program, and how many columns at a time.
        down_rows, down_step: Likewise chosen rows of A, powers of two.
        outputs, step: Likewise rows of W.
        warps, stages: Of every program; steps in flight.
    """

    pieces: int
    gate_rows: int
    gate_step: int
    down_rows: int
    down_step: int
    outputs: int
    step: int
    warps: int
    stages: int


@triton.jit
def route_of_token(
    logits,
    stride_logits,
    stride_split,
    token,
    places,
    allowed,
    scaling,
    offsets,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """Rows of A and B, int64, and ``w_j s_j``, float32, of one token at ``places`` (P, 1); place ``slot * RANK_P + i``: the slot's i-th row. -1 and 0
    past the rank and past the last slot."""
    columns = tl.arange(0, PADDED)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    tokens = token + tl.zeros([1, 1], dtype=tl.int32)
    tile = bounded_logits(logits, tokens, stride_logits, columns, count, allowed, tokens >= 0, HAS_ALLOWED, stride_split, SPLITS)
    picks, shares = top_of_tile(tile, columns, count, temperature, TOP_K, SLOTS)
    own = places // RANK_P == slots
    pick = tl.sum(tl.where(own, picks, 0), axis=1)[:, None]
    share = tl.sum(tl.where(own, shares, 0.0), axis=1)[:, None]
    rows = tl.load(offsets + pick) + places % RANK_P
    inside = (places < TOP_K * RANK_P) & (rows < tl.load(offsets + pick + 1))
    return tl.where(inside, rows, -1), tl.where(inside, share * tl.load(scaling + pick), 0.0)


@triton.jit
def chosen_kernel(
    x,
    w,
    ga,
    b,
    bias,
    allowed,
    scaling,
    offsets,
    logits,
    plan_rows,
    plan_values,
    flags,
    y,
    tokens_total,
    hidden,
    stride_w,
    count,
    gate_rows,
    stacked,
    rank,
    width0,
    width1,
    width2,
    temperature,
    MEMBERS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    MP: tl.constexpr,
    BG: tl.constexpr,
    BKG: tl.constexpr,
    GATE_SPAN: tl.constexpr,
    GATE_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    BKD: tl.constexpr,
    DOWN_SPAN: tl.constexpr,
    DOWN_PIECES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A group of up to three linears that share x, base and adapters, in one launch.

    Shapes: x, w, ga, b, bias, flags and y as :func:`meteora_kernels.triton_decode.decode_kernel` has them. Scratch: logits float32 (GATE_PIECES, M,
    MEMBERS * count), partial sums; plan_rows int32 (M, MEMBERS * TOP_K * RANK_P), the chosen rows, and plan_values float32 (DOWN_PIECES, M,
    MEMBERS * TOP_K * RANK_P), partial sums of A x times ``w_j s_j``.
    EVEN: h is a multiple of BK, BKG and BKD. WHOLE: h is a multiple of GATE_SPAN and DOWN_SPAN, the columns of a piece.
    Grid, one dimension: per member ceil(count / BG) * GATE_PIECES programs for the gates; then per member M * ceil(TOP_K * RANK_P / ROWS) *
    DOWN_PIECES for the chosen rows of A; then per member ceil(width / BN). Nobody waits for a program that comes later.
    """
    pid = tl.program_id(0)
    PLACES: tl.constexpr = TOP_K * RANK_P
    BLOCKS: tl.constexpr = (PLACES + ROWS - 1) // ROWS
    gate_programs = tl.cdiv(count, BG) * GATE_PIECES
    down_programs = tokens_total * (BLOCKS * DOWN_PIECES)
    stride_logits = MEMBERS * count
    stride_plan = MEMBERS * PLACES
    if pid < gate_programs * MEMBERS:
        member = pid // gate_programs
        piece = pid % GATE_PIECES
        local = (pid % gate_programs) // GATE_PIECES * BG + tl.arange(0, BG)[:, None]
        real = local < count
        begin = piece * GATE_SPAN
        length = GATE_SPAN if WHOLE else tl.minimum(hidden - begin, GATE_SPAN)
        gates = (member * stacked + local).to(tl.int64)
        sums = rows_times_tokens(ga + begin, gates, real, x + begin, tokens_total, length, hidden, stride_w, BG, BKG, MP, EVEN, STAGES, PRECISION)
        across = tl.arange(0, MP)[None, :]
        place = (piece * tokens_total + across) * stride_logits + member * count + local
        tl.store(logits + place, sums, mask=real & (across < tokens_total))
        raise_flag(flags + member)
    elif pid < (gate_programs + down_programs) * MEMBERS:
        index = pid - gate_programs * MEMBERS
        member = index // down_programs
        token = (index % down_programs) // (BLOCKS * DOWN_PIECES)
        block = (index // DOWN_PIECES) % BLOCKS
        piece = index % DOWN_PIECES
        places = block * ROWS + tl.arange(0, ROWS)[:, None]
        wait_flag(flags + member, gate_programs)
        chosen, factors = route_of_token(
            logits + member * count,
            stride_logits,
            stride_logits * tokens_total,
            token,
            places,
            allowed,
            scaling,
            offsets,
            count,
            temperature,
            TOP_K,
            SLOTS,
            PADDED,
            RANK_P,
            GATE_PIECES,
            HAS_ALLOWED,
        )
        a = ga + (member * stacked + gate_rows).to(tl.int64) * stride_w
        start = piece * DOWN_SPAN
        some = DOWN_SPAN if WHOLE else tl.minimum(hidden - start, DOWN_SPAN)
        here = x + token * hidden + start
        down = rows_times_tokens(a + start, chosen, chosen >= 0, here, 1, some, hidden, stride_w, ROWS, BKD, 1, EVEN, STAGES, PRECISION)
        spot = token * stride_plan + member * PLACES + places
        tl.store(plan_values + piece * tokens_total * stride_plan + spot, factors * down, mask=places < PLACES)
        tl.store(plan_rows + spot, chosen.to(tl.int32), mask=(places < PLACES) & (piece == 0))
        raise_flag(flags + 3 + member)
    else:
        tile, member, before, width = member_of(pid - (gate_programs + down_programs) * MEMBERS, width0, width1, width2, BN, MEMBERS)
        columns = tile * BN + tl.arange(0, BN)[:, None]
        column_mask = columns < width
        rows = (before + columns).to(tl.int64)
        total = rows_times_tokens(w, rows, column_mask, x, tokens_total, hidden, hidden, stride_w, BN, BK, MP, EVEN, STAGES, PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + before + columns, mask=column_mask, other=0.0).to(tl.float32)
        wait_flag(flags + 3 + member, down_programs)
        up = b + before.to(tl.int64) * rank
        rows_in = plan_rows + member * PLACES
        values_in = plan_values + member * PLACES
        split = tokens_total * stride_plan
        total = add_chosen(total, up, width, columns, column_mask, rows_in, values_in, stride_plan, split, tokens_total, PLACES, CHUNK, MP, DOWN_PIECES)
        tokens = tl.arange(0, MP)[None, :]
        outputs = width0 + width1 + width2
        tl.store(y + tokens * outputs + before + columns, total.to(y.dtype.element_ty), mask=column_mask & (tokens < tokens_total))
    finish(flags, 6)


def chosen_tile(hidden: int, outputs: int) -> Tile:
    """The fastest of the tiles tried on an H100 (docs/performance.md)."""
    if outputs >= 16384:
        return Tile(4, 16, 128, 16, 256, 64, 128, 4, 4)
    if hidden >= 8192:
        return Tile(4, 16, 256, 16, 256, 32, 256, 2, 4)
    if outputs >= 6144:
        return Tile(4, 16, 128, 16, 256, 32, 128, 2, 5)
    return Tile(4, 16, 256, 8, 256, 32, 128, 2, 5)


def span(hidden: int, pieces: int, step: int) -> int:
    """Columns of a piece: h in so many pieces of whole steps, of which the last may be shorter (and some missing)."""
    return ceil_div(ceil_div(hidden, pieces), step) * step


def decode_chosen(
    x: Tensor,
    w: Tensor,
    ga: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    flags: Tensor,
    widths: tuple[int, ...],
    rank: int,
    gate_rows: int,
    max_rank: int,
    top_k: int,
    temperature: float,
    allowed: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Base and adapters of a group of linears, for few tokens; of A only the chosen rows are read.

    Args and result are those of :func:`meteora_kernels.triton_decode.decode`, shapes and dtypes included, but for ``tile``: a :class:`Tile` instead of
    :func:`chosen_tile`'s.
    """
    tokens, hidden = x.shape
    count = scaling.shape[0]
    members = len(widths)
    mp = 16
    rank_p = max(1, power_of_two(max_rank))
    places = top_k * rank_p
    cut = tile or chosen_tile(hidden, sum(widths))
    rows = min(cut.down_rows, power_of_two(places))
    gate_span, down_span = span(hidden, cut.pieces, cut.gate_step), span(hidden, cut.pieces, cut.down_step)
    gate_pieces, down_pieces = ceil_div(hidden, gate_span), ceil_div(hidden, down_span)
    logits = torch.empty(gate_pieces, tokens, members * count, dtype=torch.float32, device=x.device)
    plan_rows = torch.empty(tokens, members * places, dtype=torch.int32, device=x.device)
    plan_values = torch.empty(down_pieces, tokens, members * places, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, sum(widths), dtype=x.dtype, device=x.device)
    programs = members * (ceil_div(count, cut.gate_rows) * gate_pieces + tokens * ceil_div(places, rows) * down_pieces)
    programs += sum(ceil_div(width, cut.outputs) for width in widths)
    padded = (*widths, 0, 0)
    chosen_kernel[(programs,)](
        x, w, ga, b, bias if bias is not None else x, allowed if allowed is not None else x, scaling, offsets, logits, plan_rows, plan_values,
        flags, y, tokens, hidden, w.stride(0), count, gate_rows, ga.shape[0] // members, rank, padded[0], padded[1], padded[2], temperature,
        MEMBERS=members, TOP_K=top_k, SLOTS=power_of_two(top_k), PADDED=padded_adapters(count), RANK_P=rank_p,
        CHUNK=chunk_of(places, mp, cut.outputs), MP=mp, BG=cut.gate_rows, BKG=cut.gate_step, GATE_SPAN=gate_span, GATE_PIECES=gate_pieces,
        ROWS=rows, BKD=cut.down_step, DOWN_SPAN=down_span, DOWN_PIECES=down_pieces, BN=cut.outputs, BK=cut.step, HAS_ALLOWED=allowed is not None,
        HAS_BIAS=bias is not None, EVEN=not any(hidden % step for step in (cut.step, cut.gate_step, cut.down_step)),
        WHOLE=hidden % gate_span == 0 and hidden % down_span == 0, STAGES=cut.stages, PRECISION="ieee",
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return y
