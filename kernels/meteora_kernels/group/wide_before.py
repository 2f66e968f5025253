# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Everything before the product of the path "wide" in one launch: gates and ``A x``, routing, and h, written into the buffer that the product reads.

If x is not in that buffer yet (:mod:`meteora_kernels.wide`), the programs that multiply x also copy it. Every program computes a tile of ``[G; A] x`` over one
piece of x's columns and stores it as float32. When all tiles and pieces of a block of tokens and a member have been stored, their programs divide the
tokens among themselves, route them, and write h. Pieces are added in a fixed order and there are no floating-point atomics, so two runs are bit-equal.

Waiting order: only the programs of one block of tokens and one member wait for each other. They are neighbours in the grid and at most as many as the GPU
runs at the same time (:func:`can_run`), so those of the first unfinished block are all running or start next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from meteora_kernels.arguments import choice_constants, kind_of_allowed, or_any
from meteora_kernels.device.chosen_rows import clear_rows, write_chosen
from meteora_kernels.device.flags import leave, share_out, wait_flag
from meteora_kernels.device.routing import allowed_from, keep_routes, routes_of_tile
from meteora_kernels.launches import Launches, Rest
from meteora_kernels.plan.machine import interpreted, why_not_at_once
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.sizes import ceil_div
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.steps.middle import Out, ranks_of
from meteora_kernels.types import Group, Routing
from meteora_kernels.wide import Wide

MOST_BLOCKS = 512
"""The largest number of blocks of tokens times members; each of these has two flags."""


@triton.jit(do_not_specialize=["tokens_total"])
def wide_before_kernel(
    x, ga, source, target, h, allowed, scaling, offsets, chosen, mid, flags, tokens_total, hidden, count, members, gate_rows, stacked, rank, stride_source,
    stride_row, first_h, second_h, padded_rank, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    PIECES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, RANKS: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr, COPY: tl.constexpr,
    COPIERS: tl.constexpr, CONCURRENT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``h[t, row] = (A x)[t, row] * w_j * s_j`` where slot j's adapter owns the row, 0 elsewhere and from R to ``padded_rank``.

    Shapes: x (M, h) and ga (P, h), tensor descriptors with blocks (BM, BK) and (BN, BK); ga holds for each member N gate rows, padding to ``gate_rows``,
    R rows of A, padding to ``stacked``; ``h`` has row stride ``stride_row`` and the dtype of x; the first member's columns start at ``first_h``, those of
    the others at ``second_h``. COPY: x, whose pointer is ``source``, is also copied to ``target``, which has the row stride of ``h``; the first COPIERS (a
    power of two up to TILES) tiles of a block each copy a part of its tokens. KEEP: the routes are written to ``chosen`` (``Routing.chosen``).
    Scratch: mid float32 (blocks of BM tokens * members, PIECES, BM, gate_rows + R), partial sums. flags int32, two for each block and member, all 0
    before and after. BLOCK: Number of tokens that a program routes. Grid, one dimension: ceil(M / BM) * members * PIECES * TILES programs, with
    TILES = ceil((gate_rows + R) / BN).
    """
    pid = tl.program_id(0)
    together = TILES * PIECES
    mine = pid % together
    index = pid // together
    member = index % members
    begin = index // members * BM
    left = tokens_total - begin
    tile = mine % TILES
    piece = mine // TILES
    row = member * stacked + tile * BN
    tokens = tl.arange(0, BM)[:, None]
    steps = tl.cdiv(hidden, BK)
    total = tl.zeros([BM, BN], dtype=tl.float32)
    lines = tile * (BM // COPIERS) + tl.arange(0, BM // COPIERS)[:, None]
    copied = (tile < COPIERS) & (member == 0) & (lines < left)
    origin = source + begin.to(tl.int64) * stride_source + lines * stride_source
    goal = target + begin.to(tl.int64) * stride_row + lines * stride_row
    for step in tl.range(steps * piece // PIECES, steps * (piece + 1) // PIECES, num_stages=STAGES):
        over = step * BK + tl.arange(0, BK)[None, :]
        if COPY:
            # The tile is loaded a second time: if a tile of the product has another use, Triton 3.6 and 3.7 allocate one buffer too few, and the copy
            # engine overwrites it while the matrix unit reads it.
            values = tl.load(origin + over, mask=copied & (over < hidden))
        total = tl.dot(x.load([begin, step * BK]), ga.load([row, step * BK]).T, total, input_precision=PRECISION)
        if COPY:
            tl.store(goal + over, values, mask=copied & (over < hidden))
    column = tl.where(member == 0, first_h, second_h + (member - 1) * padded_rank)
    own = h + begin.to(tl.int64) * stride_row + column
    width = gate_rows + rank
    here = mid + index.to(tl.int64) * (PIECES * BM * width)
    across = tile * BN + tl.arange(0, BN)[None, :]
    tl.store(here + piece * (BM * width) + tokens * width + across, total, mask=across < width)
    cleared = mine * BLOCK + tl.arange(0, BLOCK)[:, None]
    clear_rows(own, stride_row, cleared, cleared < tl.minimum(left, BM), padded_rank, CHUNK)
    first, step = share_out(flags + 2 * index, together, mine, BM // BLOCK, CONCURRENT)
    if CONCURRENT:
        wait_flag(flags + 2 * index, together)
    permitted = allowed_from(allowed, begin.to(tl.int64), count, HAS_ALLOWED)
    for share in range(first, BM // BLOCK, step):
        some = share * BLOCK + tl.arange(0, BLOCK)[:, None]
        mask = some < left
        picks, shares = routes_of_tile(
            here, some, width, permitted, here, here, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, False, BM * width, PIECES
        )
        keep_routes(chosen + (member * tokens_total + begin) * (2 * TOP_K), some, mask, picks, shares, TOP_K, SLOTS, KEEP)
        write_chosen(here + gate_rows, width, BM * width, own, stride_row, scaling, offsets, some, mask, picks, shares, TOP_K, SLOTS, RANKS, PIECES, True)
    leave(flags + 2 * index, together)


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this launch cannot run a case with a row of the table; None if it can.

    All programs that wait for each other must run at the same time, and the tokens must choose few of the rows of A.
    """
    facts, tile = case.facts, row.tile
    members = len(facts.widths)
    if not case.aligned:
        return "the copy engine cannot read these rows: it takes 16-bit numbers in rows aligned to 16 bytes"
    if tile is None or ceil_div(case.tokens, tile.tokens) * members > MOST_BLOCKS:
        return f"there are {case.tokens} tokens, more than there are flags for"
    if not ranks_of(facts.max_rank, case.top_k, Wide(facts.hidden, facts.total_rank, members).pad):
        return "the chosen rows are not few among those of A"
    return why_not_at_once(facts.device, ceil_div(gate_rows_of(facts.adapters) + facts.total_rank, tile.outputs) * row.gate_pieces)


_launches = Launches(wide_before_kernel, descriptors=2)


def run(x: Tensor, group: Group, routing: Routing, row: Row, out: Out, copy: Tensor | None) -> None:
    """Compute gates, ``A x`` and routing of a group, and write h next to x. :func:`can_run` must have returned None.

    Args:
        x: Input (..., h), columns contiguous, M >= 1 rows at the same distance and aligned to 16 bytes, float16 or bfloat16.
        group: The group of linears; base weights and B are not read.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table: ``gate_pieces`` is the number of pieces of the sums over x's columns. The launch reads ``tokens``, ``outputs``, ``step``,
            ``warps`` and ``stages`` of its tile.
        out: Destination of h.
        copy: Destination of a copy of x (M, h), columns of ``out``'s rows; None if x is there already.
    """
    assert row.tile is not None
    tokens, hidden = x.shape[:-1].numel(), x.shape[-1]
    result, first, second, padded = out
    bm, bn, bk, warps, stages = row.tile[:5]
    adapters, rank, gate_rows = group.adapters, group.total_rank, group.gate_rows
    ga, scaling, members, pieces = adapters.gate, adapters.scaling, adapters.members, row.gate_pieces
    width = gate_rows + rank
    tiles, index = ceil_div(width, bn), ceil_div(tokens, bm) * members
    mid = torch.empty(index, pieces, bm, width, dtype=torch.float32, device=x.device)
    strides = x.stride(-2), result.stride(-2)
    key = (
        tokens, hidden, ga.shape[0], members, width, adapters.member_rows, *strides, first, second, padded, pieces, row.tile, adapters.max_rank, routing.top_k,
        routing.temperature, kind_of_allowed(routing.allowed), routing.chosen is None, copy is None, x.dtype, scaling.dtype,
    )  # fmt: skip

    def rest() -> Rest:
        numbers = (tokens, hidden, scaling.shape[0], members, gate_rows, adapters.member_rows, rank, *strides, first, second, padded, routing.temperature)
        constants = {
            **choice_constants(adapters, routing), "BM": bm, "BN": bn, "BK": bk, "TILES": tiles, "PIECES": pieces,
            "BLOCK": max(1, bm >> ((tiles * pieces).bit_length() - 1)), "CHUNK": min(256, padded & -padded),
            "RANKS": ranks_of(adapters.max_rank or 0, routing.top_k, padded), "KEEP": routing.chosen is not None, "COPY": copy is not None,
            "COPIERS": min(bm, 1 << (tiles.bit_length() - 1)), "CONCURRENT": not interpreted(), "STAGES": stages, "PRECISION": "ieee", "num_warps": warps,
            "num_stages": stages,
        }  # fmt: skip
        return Rest((index * pieces * tiles,), numbers, constants)

    right = group.views.get((bn, bk))
    if right is None:
        right = group.views[bn, bk] = TensorDescriptor(ga, [ga.shape[0], hidden], [ga.stride(0), 1], [bn, bk])
    left = TensorDescriptor(x, [tokens, hidden], [strides[0], 1], [bm, bk])
    rows = (
        left,
        right,
        x,
        or_any(copy, x),
        result,
        or_any(routing.allowed, scaling),
        scaling,
        adapters.offsets,
        or_any(routing.chosen, scaling),
        mid,
        group.flags,
    )
    _launches(key, rows, rest)
