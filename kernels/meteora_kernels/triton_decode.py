# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears at few tokens (decoding): every weight is read once, at the rate of the memory, and the adapters ride along.

:func:`decode_kernel` does a whole group of linears that share their input (q, k, v or gate, up, or one alone) in ONE launch. Its first
programs compute the gates and ``A x`` of all rows of A, the last of them routes and raises a flag; the others stream the base weights meanwhile, wait
for the flag (which is up by then), add the chosen rows of B, and write the output. No floating-point atomics: two runs are bit-equal.
Where many tokens choose many rows of a small A this is faster than :mod:`meteora_kernels.triton_chosen`, which reads chosen rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two
from meteora_kernels.triton_route import bounded_logits, slot_of, summed, top_of_tile
from meteora_kernels.triton_sync import finish, raise_flag, wait_flag


@triton.jit
def rows_times_tokens(
    w,
    rows,
    row_mask,
    x,
    tokens_total,
    length,
    stride_x,
    stride_w,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MP: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
def routes_of_few(
    mid,
    stride_mid,
    allowed,
    scaling,
    offsets,
    tokens_total,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    MP: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """picks, ``w_j s_j``, first and last rows, each (MP, SLOTS), from the logits (M, N) at ``mid``."""
    tokens = tl.arange(0, MP)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    tile = bounded_logits(mid, tokens, stride_mid, columns, count, allowed, tokens < tokens_total, HAS_ALLOWED)
    picks, shares = top_of_tile(tile, columns, count, temperature, TOP_K, SLOTS)
    return picks, shares * tl.load(scaling + picks), tl.load(offsets + picks), tl.load(offsets + picks + 1)


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


@triton.jit
def add_chosen(
    total,
    b,
    width,
    columns,
    column_mask,
    rows_in,
    values_in,
    stride_plan,
    stride_split,
    tokens_total,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    MP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """float32 ``total`` (BN, MP) plus, per token, its chosen rows of ``b`` (R, width) at ``columns`` (BN, 1), each times its value.

    rows_in int32 and values_in float32 (M, PLACES), rows ``stride_plan`` apart, CHUNK places at a time; row -1: nothing is chosen there. The
    values are the sum of SPLITS that lie ``stride_split`` apart.
    """
    tokens = tl.arange(0, MP)[:, None]
    live = tokens < tokens_total
    across = tl.trans(columns)
    across_mask = tl.trans(column_mask)
    for start in tl.static_range(0, PLACES, CHUNK):
        place = tokens * stride_plan + start + tl.arange(0, CHUNK)[None, :]
        rows = tl.load(rows_in + place, mask=live, other=-1, cache_modifier=".cg")
        values = summed(values_in, place, stride_split, live, SPLITS, True)
        wanted = live[:, :, None] & across_mask[None, :, :] & (rows >= 0)[:, :, None]
        chosen = tl.load(b + rows[:, :, None].to(tl.int64) * width + across[None, :, :], mask=wanted, other=0.0)
        total += tl.trans(tl.sum(values[:, :, None] * chosen.to(tl.float32), axis=1))
    return total


@triton.jit
def write_plan(
    here,
    stride_mid,
    gate_rows,
    rows_out,
    values_out,
    stride_plan,
    allowed,
    scaling,
    offsets,
    tokens_total,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    MP: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """Route every token; per token, slot and place up to RANK_P, write the row of A and B (-1 past the rank) and ``w_j s_j`` times ``A x``."""
    _, scaled, first, last = routes_of_few(here, stride_mid, allowed, scaling, offsets, tokens_total, count, temperature, TOP_K, SLOTS, PADDED, MP, HAS_ALLOWED)
    tokens = tl.arange(0, MP)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    live = tokens < tokens_total
    inner = tl.arange(0, RANK_P)[None, :]
    for slot in tl.static_range(TOP_K):
        rows = slot_of(first, slots, slot) + inner
        inside = live & (rows < slot_of(last, slots, slot))
        values = tl.where(inside, slot_of(scaled, slots, slot), 0.0)
        values *= tl.load(here + tokens * stride_mid + gate_rows + rows, mask=inside, other=0.0, cache_modifier=".cg")
        place = tokens * stride_plan + slot * RANK_P + inner
        tl.store(rows_out + place, tl.where(inside, rows, -1).to(tl.int32), mask=live)
        tl.store(values_out + place, values, mask=live)


@triton.jit
def decode_kernel(
    x,
    w,
    ga,
    b,
    bias,
    allowed,
    scaling,
    offsets,
    mid,
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
    stride_mid,
    member_mid,
    stride_plan,
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
    BN: tl.constexpr,
    BK: tl.constexpr,
    BKG: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A group of up to three linears that share x, base and adapters, in one launch.

    Shapes: x (M, h) contiguous, M <= MP; w (O, h), the members' weights one behind the other, O = sum of widths; ga: per member N gate
    rows, padding to ``gate_rows``, R rows of A, padding to ``stacked``, (MEMBERS * stacked, h); rows of w and of ga are ``stride_w`` apart;
    b: per member (R, width); bias (O,);
    mid float32 scratch (M, stride_mid), per member ``member_mid`` columns: logits in ``gate_rows``, then A x; plan_rows
    int32 and plan_values float32 scratch (M, MEMBERS * TOP_K * RANK_P); flags int32 (8,), all 0 before and after; y (M, O).
    Grid, one dimension: first the gate programs (BG rows of ga each), of which the last to end routes; then per member ceil(width / BN) programs.
    """
    pid = tl.program_id(0)
    first_rows = gate_rows + rank
    gate_tiles = tl.cdiv(first_rows, BG)
    first_phase = gate_tiles * MEMBERS
    PLACES: tl.constexpr = TOP_K * RANK_P
    if pid < first_phase:
        member = pid // gate_tiles
        local = (pid % gate_tiles) * BG + tl.arange(0, BG)[:, None]
        mask = local < first_rows
        gates = (member * stacked + local).to(tl.int64)
        sums = rows_times_tokens(ga, gates, mask, x, tokens_total, hidden, hidden, stride_w, BG, BKG, MP, EVEN, STAGES, PRECISION)
        tokens = tl.arange(0, MP)[None, :]
        here = mid + member * member_mid
        tl.store(here + tokens * stride_mid + local, sums, mask=mask & (tokens < tokens_total))
        tl.debug_barrier()
        if tl.atomic_add(flags + member, 1, sem="acq_rel", scope="gpu") == gate_tiles - 1:
            tl.debug_barrier()
            write_plan(
                here,
                stride_mid,
                gate_rows,
                plan_rows + member * PLACES,
                plan_values + member * PLACES,
                stride_plan,
                allowed,
                scaling,
                offsets,
                tokens_total,
                count,
                temperature,
                TOP_K,
                SLOTS,
                PADDED,
                RANK_P,
                MP,
                HAS_ALLOWED,
            )
            raise_flag(flags + 3 + member)
    else:
        tile, member, before, width = member_of(pid - first_phase, width0, width1, width2, BN, MEMBERS)
        columns = tile * BN + tl.arange(0, BN)[:, None]
        column_mask = columns < width
        rows = (before + columns).to(tl.int64)
        total = rows_times_tokens(w, rows, column_mask, x, tokens_total, hidden, hidden, stride_w, BN, BK, MP, EVEN, STAGES, PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + before + columns, mask=column_mask, other=0.0).to(tl.float32)
        wait_flag(flags + 3 + member, 1)
        up = b + before.to(tl.int64) * rank
        plan = member * PLACES
        total = add_chosen(total, up, width, columns, column_mask, plan_rows + plan, plan_values + plan, stride_plan, 0, tokens_total, PLACES, CHUNK, MP, 1)
        tokens = tl.arange(0, MP)[None, :]
        outputs = width0 + width1 + width2
        tl.store(y + tokens * outputs + before + columns, total.to(y.dtype.element_ty), mask=column_mask & (tokens < tokens_total))
    finish(flags, 6)


def new_flags(device: torch.device) -> Tensor:
    """The zeroed flags by which the programs of a launch wait for each other, in every kernel of fused groups; one tensor per group and CUDA stream."""
    return torch.zeros(1024, dtype=torch.int32, device=device)


def chunk_of(places: int, tokens: int, outputs: int) -> int:
    """How many places :func:`add_chosen` takes at a time: a power of two that divides ``places``, for tiles of ``tokens`` by ``outputs``."""
    return min(16, places & -places, max(1, 8192 // (tokens * outputs)))


def decode_tile(hidden: int, outputs: int) -> tuple[int, int, int, int, int, int]:
    """The fastest of the tiles tried on an H100 (docs/performance.md): BG, BN, BK, BKG, warps, stages."""
    if outputs >= 16384:
        return 16, 64, 128, 128, 4, 4
    if hidden >= 8192:
        return 16, 32, 256, 256, 2, 4
    return 16, 32, 128, 128, 2, 5


def decode(
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
    tile: tuple[int, int, int, int, int, int] | None = None,
) -> Tensor:
    """Base and adapters of a group of linears, for few tokens.

    Args:
        x: (M, h), contiguous, 1 <= M <= 16.
        w: (O, h), columns contiguous.
        ga: (members * stacked, h), its rows as far apart as those of w: per member N gate rows, padding to ``gate_rows``, R rows of A, padding.
        b: Per member (R, width), contiguous, one behind the other.
        bias: (O,) or None.
        scaling: float32 (N,).
        offsets: int64 (N + 1,).
        flags: As :func:`new_flags` makes them.
        widths: Outputs of each member.
        rank: R.
        gate_rows: Where A starts in a member's part of ``ga``.
        max_rank: The largest rank.
        top_k: k.
        temperature: T.
        allowed: bool (N,) or None.
        tile: BG, BN, BK, BKG, warps, stages instead of the default.

    Returns:
        (M, O), the dtype of x.
    """
    tokens, hidden = x.shape
    count = scaling.shape[0]
    members = len(widths)
    stacked = ga.shape[0] // members
    mp = 16
    rank_p = max(1, power_of_two(max_rank))
    bg, bn, bk, bkg, warps, stages = tile or decode_tile(hidden, sum(widths))
    chunk = chunk_of(top_k * rank_p, mp, bn)
    member_mid = gate_rows + rank
    mid = torch.empty(tokens, members * member_mid, dtype=torch.float32, device=x.device)
    plan_rows = torch.empty(tokens, members * top_k * rank_p, dtype=torch.int32, device=x.device)
    plan_values = torch.empty(tokens, members * top_k * rank_p, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, sum(widths), dtype=x.dtype, device=x.device)
    programs = members * ceil_div(gate_rows + rank, bg) + sum(ceil_div(width, bn) for width in widths)
    padded = (*widths, 0, 0)
    decode_kernel[(programs,)](
        x, w, ga, b, bias if bias is not None else x, allowed if allowed is not None else x, scaling, offsets, mid, plan_rows, plan_values,
        flags, y, tokens, hidden, w.stride(0), count, gate_rows, stacked, rank, mid.stride(0), member_mid, plan_rows.stride(0), padded[0], padded[1],
        padded[2], temperature,
        MEMBERS=members, TOP_K=top_k, SLOTS=power_of_two(top_k), PADDED=padded_adapters(count), RANK_P=rank_p,
        CHUNK=chunk, MP=mp, BG=bg, BN=bn, BK=bk, BKG=bkg, HAS_ALLOWED=allowed is not None, HAS_BIAS=bias is not None,
        EVEN=hidden % bk == 0 and hidden % bkg == 0, STAGES=stages, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
