# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears for a few dozen tokens and many adapters: A and B of every adapter that some token chose are read once for all tokens.

There are two launches. The programs of :func:`begin_kernel` read the base weights and, at the same time, do what B needs: they compute the gates, route the
tokens, list the chosen adapters, and multiply the rows of A of the adapters in the list with all tokens. Products with adapters that a token did not choose
are set to 0. :func:`finish_kernel` adds the rows of B of these adapters to the base. Sums are float32, a program that needs a whole sum adds its pieces in a
fixed order, and there are no floating-point atomics, so two runs are bit-equal.

Waiting order: programs that route wait for the gates, and those of A for all routes of their member. Both come later in the grid than the programs that
they wait for, and between them come as many programs of the base as start at the same time as the gates. Programs of the base do not wait. So no
program waits forever, and few are idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from meteora_kernels.arguments import choice_constants, or_any, three
from meteora_kernels.device.flags import clear_when_last, count_out, raise_flag, wait_flag
from meteora_kernels.device.routing import keep_routes, routes_of_logits, summed
from meteora_kernels.device.rows import member_of
from meteora_kernels.plan.machine import at_once, why_not_at_once
from meteora_kernels.plan.table import Case, Row, why_not_one_tile
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.types import WHOLE, Form, Group, Routing

_FIRST_TILE = tl.constexpr(8)
"""The first of the flags that count the finished pieces of every tile of A. Flags 0 to 2 count, for each member, the programs of the gates that have stored
their sums, flags 3 to 5 those that have routed their tokens, and one more if the list is written, and flag 6 all programs that no longer read flags."""
ROUTED = 4
"""The largest number of tokens that a program routes."""
FINISH = (64, 64, 4, 3)
"""Outputs, rows of B at a time, warps and stages of a program of :func:`finish_kernel`."""


@triton.jit
def begin_kernel(
    x, packed, a, allowed, scaling, offsets, chosen, logits, sums, picks, factors, present, listed, counts, parts, middle, rows_out, flags,
    tokens_total, hidden, outputs, count, stacked, stride_a, temperature, early, tiles,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, TOKENS_P: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GATE_PIECES: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr,
    THREADS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The base product, and ``w_j s_j A x`` for the rows of A of all adapters that some token chose.

    Shapes: x (M, h), M <= TOKENS_P, and packed (P, h), tensor descriptors with blocks (TOKENS_P, BK) and (BN, BK); packed holds the O base rows of all
    members, then for each member N gate rows, padding, R rows of A, padding to ``stacked``; ``a`` is the first member's first row of A.
    Results: sums float32 (PIECES, O, TOKENS_P), the base; counts int32 (MEMBERS,), the numbers of chosen adapters; for ``tiles * BN`` places a member, RANK_P
    for each chosen adapter in ascending order, rows_out int32 (MEMBERS, places), the row of A or -1, and middle (MEMBERS, places, TOKENS_P) in the dtype
    of ``a``. Tiles without a chosen adapter are not written.
    Scratch: logits float32 (GATE_PIECES, M, MEMBERS * N), partial sums; picks int32 and factors float32 (MEMBERS, M, TOP_K), the routes and ``w_j s_j``;
    present and listed int32 (MEMBERS, PADDED), whether an adapter is chosen, and the chosen adapters; parts float32 (MEMBERS * tiles, GATE_PIECES, BN,
    TOKENS_P).
    flags int32 (1024,), all 0 before and after. KEEP: the routes are written to ``chosen`` (``Routing.chosen``).
    Grid, one dimension: for each member ceil(N / BN) * GATE_PIECES programs for the gates; ``early`` of the ceil(O / BN) * PIECES
    programs of the base; for each member ceil(M / BLOCK) programs that route; for each member ``tiles`` * GATE_PIECES programs of A; the others of the base.
    """
    pid = tl.program_id(0)
    per_member = tl.cdiv(count, BN) * GATE_PIECES
    route_programs = tl.cdiv(tokens_total, BLOCK)
    first_base = per_member * MEMBERS
    first_route = first_base + early
    first_down = first_route + route_programs * MEMBERS
    first_late = first_down + tiles * (GATE_PIECES * MEMBERS)
    stride_logits = MEMBERS * count
    along = tl.arange(0, TOKENS_P)[None, :]
    blocks = tl.cdiv(hidden, BK)
    total = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
    come = tl.zeros([THREADS], dtype=tl.int32)
    if (pid < first_route) | (pid >= first_late):
        is_gate = pid < first_base
        index = tl.where(pid < first_route, pid - first_base, pid - first_late + early)
        member = tl.where(is_gate, pid // per_member, 0)
        tile = tl.where(is_gate, pid % per_member // GATE_PIECES, index // PIECES)
        piece = tl.where(is_gate, pid % GATE_PIECES, index % PIECES)
        pieces = tl.where(is_gate, GATE_PIECES, PIECES)
        row = tl.where(is_gate, outputs + member * stacked, 0) + tile * BN
        for step in tl.range(blocks * piece // pieces, blocks * (piece + 1) // pieces, num_stages=STAGES):
            total = tl.dot(packed.load([row, step * BK]), x.load([0, step * BK]).T, total, input_precision=PRECISION)
        local = tile * BN + tl.arange(0, BN)[:, None]
        if is_gate:
            place = (piece * tokens_total + along) * stride_logits + member * count + local
            tl.store(logits + place, total, mask=(local < count) & (along < tokens_total))
            tl.store(present + member * PADDED + local, local * 0, mask=(local < count) & (piece == 0))
            raise_flag(flags + member)
        else:
            goal = (piece * outputs + local).to(tl.int64) * TOKENS_P + along
            tl.store(sums + goal, total, mask=(local < outputs) & (along < tokens_total))
        come = count_out(flags + 6, THREADS)
    elif pid < first_down:
        member = (pid - first_route) // route_programs
        tokens = (pid - first_route) % route_programs * BLOCK + tl.arange(0, BLOCK)[:, None]
        live = tokens < tokens_total
        slots = tl.arange(0, SLOTS)[None, :]
        wait_flag(flags + member, per_member)
        found, shares = routes_of_logits(
            logits + member * count, tokens, stride_logits, allowed, live, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, stride_logits * tokens_total,
            GATE_PIECES,
        )  # fmt: skip
        keep_routes(chosen + member * tokens_total * (2 * TOP_K), tokens, live, found, shares, TOP_K, SLOTS, KEEP)
        own = live & (slots < TOP_K)
        place = (member * tokens_total + tokens) * TOP_K + slots
        tl.store(picks + place, found, mask=own)
        tl.store(factors + place, shares * tl.load(scaling + found), mask=own)
        tl.store(present + member * PADDED + found, found * 0 + 1, mask=own)  # several programs may store the same
        tl.debug_barrier()
        last = tl.atomic_add(flags + 3 + member, 1, sem="acq_rel", scope="gpu") == route_programs - 1
        tl.debug_barrier()
        if last:
            columns = tl.arange(0, PADDED)
            here = tl.load(present + member * PADDED + columns, mask=columns < count, other=0, cache_modifier=".cg")
            before = tl.cumsum(here, axis=0) - here
            tl.store(listed + member * PADDED + before, columns, mask=here == 1)
            tl.store(counts + member, tl.sum(here, axis=0))
            raise_flag(flags + 3 + member)
        come = count_out(flags + 6, THREADS)
    else:
        member = (pid - first_down) // (tiles * GATE_PIECES)
        tile = (pid - first_down) // GATE_PIECES % tiles
        piece = (pid - first_down) % GATE_PIECES
        wait_flag(flags + 3 + member, route_programs + 1)
        used = tl.load(counts + member, cache_modifier=".cg") * RANK_P
        if tile * BN < used:
            places = tile * BN + tl.arange(0, BN)[:, None]
            adapter = tl.load(listed + member * PADDED + places // RANK_P, mask=places < used, other=0, cache_modifier=".cg")
            row = tl.load(offsets + adapter) + places % RANK_P
            real = (places < used) & (row < tl.load(offsets + adapter + 1))
            steps = tl.arange(0, BK)[None, :]
            here = a + ((member * stacked).to(tl.int64) + row) * stride_a + steps
            for step in tl.range(blocks * piece // GATE_PIECES, blocks * (piece + 1) // GATE_PIECES, num_stages=STAGES):
                down = tl.load(here + step * BK, mask=real & (step * BK + steps < hidden), other=0.0)
                total = tl.dot(down, x.load([0, step * BK]).T, total, input_precision=PRECISION)
            index = member * tiles + tile
            spots = tl.arange(0, BN)[:, None] * TOKENS_P + along
            own_parts = parts + index.to(tl.int64) * (GATE_PIECES * BN * TOKENS_P)
            tl.store(own_parts + piece * (BN * TOKENS_P) + spots, total)
            tl.debug_barrier()
            final = tl.atomic_add(flags + _FIRST_TILE + index, 1, sem="acq_rel", scope="gpu") == GATE_PIECES - 1
            tl.debug_barrier()
            if final:
                values = summed(own_parts, spots, BN * TOKENS_P, spots >= 0, GATE_PIECES, True)
                factor = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
                for slot in tl.static_range(TOP_K):
                    place = (member * tokens_total + along) * TOP_K + slot
                    pick = tl.load(picks + place, mask=along < tokens_total, other=-1, cache_modifier=".cg")
                    share = tl.load(factors + place, mask=along < tokens_total, other=0.0, cache_modifier=".cg")
                    factor += tl.where((pick == adapter) & real, share, 0.0)
                values = tl.where(factor == 0.0, 0.0, values * factor)
                spot = member * tiles * BN + places
                tl.store(middle + spot.to(tl.int64) * TOKENS_P + along, values.to(middle.dtype.element_ty))
                tl.store(rows_out + spot, tl.where(real, row, -1).to(tl.int32))
        come = count_out(flags + 6, THREADS)
    clear_when_last(flags, come, THREADS)


@triton.jit
def finish_kernel(
    sums, bias, b, middle, rows_in, counts, y, tokens_total, rank, outputs, places, width0, width1, width2,
    MEMBERS: tl.constexpr, RANK_P: tl.constexpr, TOKENS_P: tl.constexpr, BN: tl.constexpr, ENTRIES: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write base plus bias plus ``B^T middle`` to y (M, O); sums, middle, rows_in (MEMBERS, places) and counts are results of :func:`begin_kernel`.

    Grid: (sum of ceil(width / BN) over the members,).
    """
    tile, member, before, width = member_of(tl.program_id(0), width0, width1, width2, BN, MEMBERS)
    columns = tile * BN + tl.arange(0, BN)[:, None]
    along = tl.arange(0, TOKENS_P)[None, :]
    inside = columns < width
    used = tl.load(counts + member) * RANK_P
    up = b + before.to(tl.int64) * rank
    total = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
    for start in tl.range(0, used, ENTRIES, num_stages=STAGES):
        entries = member * places + start + tl.arange(0, ENTRIES)
        rows = tl.load(rows_in + entries)[None, :]
        values = tl.load(middle + entries.to(tl.int64)[:, None] * TOKENS_P + along)
        chosen = tl.load(up + rows.to(tl.int64) * width + columns, mask=(rows >= 0) & inside, other=0.0)
        total = tl.dot(chosen, values, total, input_precision=PRECISION)
    place = (before + columns).to(tl.int64) * TOKENS_P + along
    total += summed(sums, place, outputs.to(tl.int64) * TOKENS_P, inside & (along < tokens_total), SPLITS)
    if HAS_BIAS:
        total += tl.load(bias + before + columns, mask=inside, other=0.0).to(tl.float32)
    tokens = tl.arange(0, TOKENS_P)[:, None]
    across = tile * BN + tl.arange(0, BN)[None, :]
    tl.store(y + tokens * outputs + before + across, total.T.to(y.dtype.element_ty), mask=(tokens < tokens_total) & (across < width))


def tiles_of(case: Case, outputs: int) -> int:
    """The largest number of tiles of ``outputs`` places that a member's chosen adapters need."""
    return max(1, ceil_div(min(case.facts.adapters, case.tokens * case.top_k) * max(1, power_of_two(case.facts.max_rank)), outputs))


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    facts, tile = case.facts, row.tile
    reason = why_not_one_tile(case, row)
    if tile is None or reason is not None:
        return reason
    if case.top_k > 16 or facts.adapters > 4096:
        return f"top-k is {case.top_k} of {facts.adapters} adapters, the kernels take up to 16 of 4,096"
    if len(facts.widths) * tiles_of(case, tile.outputs) > 1016:
        return "the tokens may choose more rows than there are flags for"
    return why_not_at_once(facts.device, 1)


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears for a few dozen tokens, base and adapters together: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous, 1 <= M <= ``tile.tokens``, float16 or bfloat16, rows aligned to 16 bytes.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table: ``gate_pieces`` is the number of pieces of the sums for gates and A, ``pieces`` that of the sums for base outputs. The path
            reads ``tokens``, ``outputs``, ``step``, ``warps`` and ``stages`` of its tile.
        form: Ignored by this path.
    """
    assert row.tile is not None
    tokens, hidden = x.shape
    adapters, packed = group.adapters, group.packed
    _, lora_A, b, scaling, offsets, _, widths, stacked = adapters
    members, outputs, count = len(widths), sum(widths), adapters.number
    tokens_p, bn, bk, warps, stages = row.tile[:5]
    tiles = tiles_of(Case(group.facts, tokens, routing.top_k), bn)
    block = max(1, min(ROUTED, 2048 // adapters.padded))
    gate_programs, base_programs = members * ceil_div(count, bn) * row.gate_pieces, ceil_div(outputs, bn) * row.pieces
    early = max(0, min(base_programs, at_once(x.device) - gate_programs))

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    logits, sums = new(row.gate_pieces, tokens, members * count), new(row.pieces, outputs, tokens_p)
    picks, factors = new(members, tokens, routing.top_k, dtype=torch.int32), new(members, tokens, routing.top_k)
    lists = new(2, members, adapters.padded, dtype=torch.int32)
    counts, rows = new(members, dtype=torch.int32), new(members, tiles * bn, dtype=torch.int32)
    parts, middle = new(members * tiles, row.gate_pieces, bn, tokens_p), new(members, tiles * bn, tokens_p, dtype=x.dtype)
    y = new(tokens, outputs, dtype=x.dtype)
    programs = gate_programs + base_programs + members * (ceil_div(tokens, block) + tiles * row.gate_pieces)
    begin_kernel[(programs,)](
        TensorDescriptor(x, [tokens, hidden], [x.stride(0), 1], [tokens_p, bk]),
        TensorDescriptor(packed, [packed.shape[0], hidden], [packed.stride(0), 1], [bn, bk]), lora_A, or_any(routing.allowed, scaling), scaling, offsets,
        or_any(routing.chosen, scaling), logits, sums, picks, factors, lists[0], lists[1], counts, parts, middle, rows, group.flags, tokens, hidden, outputs,
        count, stacked, lora_A.stride(0), routing.temperature, early, tiles, **choice_constants(adapters, routing), MEMBERS=members,
        RANK_P=adapters.rank_p, TOKENS_P=tokens_p, BN=bn, BK=bk, GATE_PIECES=row.gate_pieces, PIECES=row.pieces, BLOCK=block,
        KEEP=routing.chosen is not None, THREADS=32 * warps, STAGES=stages, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    columns, entries, warps, stages = FINISH
    finish_kernel[(sum(ceil_div(width, columns) for width in widths),)](
        sums, or_any(group.bias, sums), b, middle, rows, counts, y, tokens, group.total_rank, outputs, tiles * bn, *three(widths),
        MEMBERS=members, RANK_P=adapters.rank_p, TOKENS_P=tokens_p, BN=columns, ENTRIES=min(entries, bn), SPLITS=row.pieces, HAS_BIAS=group.bias is not None,
        STAGES=stages, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
