# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""What B is multiplied with, in one launch: gates and ``A x``, the routing, and the routed, scaled rows written where a product reads them.

For prefill of fused groups in the order "wide" (:mod:`meteora_kernels.wide`). Every program owns a tile of ``[G; A] x`` and one piece of the sum over
x's columns, and stores it as float32. Once all tiles and pieces of a block of tokens and a member are there, their programs share out these tokens, route them, and
write h beside x. Pieces are added in their order, so two runs are bit-equal; there are no floating-point atomics.

Who waits for whom: the programs of one block of tokens and one member for each other, and nobody else. They are neighbours in the grid and fewer than the
GPU runs at once (:func:`can_inner`), so all of the first such block that is not done yet are running, whatever comes after them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from meteora_kernels import plan
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.triton_middle import clear_rows, ranks_of, routes_of_tile, write_chosen
from meteora_kernels.triton_sync import leave, multiprocessors, readable, share_out, wait_flag

MOST_BLOCKS = 512
"""Blocks of tokens, times members, that have two flags each."""
COPY_TILE = (8, 1024)
"""Tokens and columns that a program copies."""


@triton.jit(do_not_specialize=["multiplying", "tokens_total"])
def inner_kernel(
    x,
    again,
    ga,
    x_pointer,
    buffer,
    allowed,
    scaling,
    offsets,
    mid,
    flags,
    tokens_total,
    hidden,
    count,
    gate_rows,
    stacked,
    rank,
    multiplying,
    stride_x,
    stride_buffer,
    first_inner,
    second_inner,
    x_column,
    padded,
    temperature,
    members,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    COPY: tl.constexpr,
    COPY_M: tl.constexpr,
    COPY_N: tl.constexpr,
    CONCURRENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < multiplying:
        index = pid // (TILES * PIECES)
        block = index // members
        member = index % members
        piece = (pid % (TILES * PIECES)) // TILES
        tile = pid % TILES
        steps = tl.cdiv(hidden, BK)
        row = member * stacked + tile * BN
        total = tl.zeros([BM, BN], dtype=tl.float32)
        tokens = tl.arange(0, BM)[:, None]
        if COPY == 0:
            for step in tl.range(steps * piece // PIECES, steps * (piece + 1) // PIECES, num_stages=STAGES):
                total = tl.dot(x.load([block * BM, step * BK]), ga.load([row, step * BK]).T, total, input_precision=PRECISION)
        else:
            source = x_pointer + (block * BM).to(tl.int64) * stride_x
            target = buffer + (block * BM).to(tl.int64) * stride_buffer + x_column
            for step in tl.range(steps * piece // PIECES, steps * (piece + 1) // PIECES, num_stages=STAGES):
                total = tl.dot(x.load([block * BM, step * BK]), ga.load([row, step * BK]).T, total, input_precision=PRECISION)
                over = step * BK + tl.arange(0, BK)[None, :]
                inside = (tile == 0) & (block * BM + tokens < tokens_total) & (over < hidden)
                if COPY == 1:
                    values = again.load([block * BM, step * BK])
                else:
                    values = tl.load(source + tokens * stride_x + over, mask=inside)
                tl.store(target + tokens * stride_buffer + over, values, mask=inside)
        columns = tl.arange(0, BN)[None, :]
        left = tokens_total - block * BM
        column = tl.where(member == 0, first_inner, second_inner + (member - 1) * padded)
        inner = buffer + (block * BM).to(tl.int64) * stride_buffer + column
        width_mid = gate_rows + rank
        here = mid + index.to(tl.int64) * (PIECES * BM * width_mid)
        across = tile * BN + columns
        tl.store(here + piece * (BM * width_mid) + tokens * width_mid + across, total, mask=across < width_mid)
        own = (pid % (TILES * PIECES)) * BLOCK + tl.arange(0, BLOCK)[:, None]
        clear_rows(inner, stride_buffer, own, own < tl.minimum(left, BM), padded, CHUNK)
        start, step = share_out(flags + 2 * index, TILES * PIECES, pid % (TILES * PIECES), BM // BLOCK, CONCURRENT)
        if CONCURRENT:
            wait_flag(flags + 2 * index, TILES * PIECES)
        for share in range(start, BM // BLOCK, step):
            some = share * BLOCK + tl.arange(0, BLOCK)[:, None]
            mask = some < left
            picks, shares = routes_of_tile(
                here, some, width_mid, allowed, here, here, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, False, BM * width_mid, PIECES
            )
            write_chosen(here + gate_rows, width_mid, BM * width_mid, inner, stride_buffer, scaling, offsets, some, mask, picks, shares, TOP_K, SLOTS, RANKS, PIECES, True)
        leave(flags + 2 * index, TILES * PIECES)
    elif COPY_M > 0:
        strips = tl.cdiv(hidden, COPY_N)
        part = pid - multiplying
        copied = (part // strips * COPY_M + tl.arange(0, COPY_M)).to(tl.int64)[:, None]
        places = (part % strips) * COPY_N + tl.arange(0, COPY_N)[None, :]
        within = (copied < tokens_total) & (places < hidden)
        tl.store(buffer + copied * stride_buffer + x_column + places, tl.load(x_pointer + copied * stride_x + places, mask=within), mask=within)


def can_inner(ga: Tensor, tokens: int, members: int, width: int, tile: tuple[int, int, int, int, int], pieces: int) -> bool:
    """Whether :func:`inner` can run here: a Hopper GPU that runs all programs at once that wait for each other, and flags enough for all blocks of tokens."""
    if not readable(ga) or ceil_div(tokens, tile[0]) * members > MOST_BLOCKS:
        return False
    if ga.device.type != "cuda":
        return plan.interpreted()
    return ceil_div(width, tile[1]) * pieces <= multiprocessors(ga.device)


def inner(x, ga, scaling, offsets, allowed, flags, members, rank, gate_rows, stacked, max_rank, top_k, temperature, buffer, places, pad, x_column, tile, pieces, copy=None):  # fmt: skip
    tokens, hidden = x.shape
    count = scaling.shape[0]
    bm, bn, bk, warps, stages = tile
    width = gate_rows + rank
    tiles = ceil_div(width, bn)
    index = ceil_div(tokens, bm) * members
    multiplying = index * tiles * pieces
    copy_m, copy_n = (COPY_TILE[0], min(COPY_TILE[1], power_of_two(hidden))) if copy == 3 else (0, 0)
    copying = ceil_div(tokens, copy_m) * ceil_div(hidden, copy_n) if copy == 3 else 0
    mid = torch.empty(index, pieces, bm, width, dtype=torch.float32, device=x.device)
    rows = TensorDescriptor(x, [tokens, hidden], [x.stride(0), 1], [bm, bk])
    again = TensorDescriptor(x, [tokens, hidden], [x.stride(0), 1], [bm, bk]) if copy == 1 else rows
    inner_kernel[(multiplying + copying,)](
        rows, again, TensorDescriptor(ga, [ga.shape[0], hidden], [ga.stride(0), 1], [bn, bk]),
        x, buffer, allowed if allowed is not None else scaling, scaling, offsets, mid, flags,
        tokens, hidden, count, gate_rows, stacked, rank, multiplying, x.stride(0), buffer.stride(0), places[0], places[1], x_column, pad, temperature, members,
        TOP_K=top_k, SLOTS=power_of_two(top_k), PADDED=max(2, power_of_two(count)), BM=bm, BN=bn, BK=bk, TILES=tiles, PIECES=pieces,
        BLOCK=max(1, bm // (1 << ((tiles * pieces).bit_length() - 1))), CHUNK=min(256, pad & -pad), RANKS=ranks_of(max_rank, top_k, pad),
        HAS_ALLOWED=allowed is not None, COPY=copy if copy in (1, 2) else 0,
        COPY_M=copy_m, COPY_N=copy_n, CONCURRENT=not plan.interpreted(), STAGES=stages, PRECISION="ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
