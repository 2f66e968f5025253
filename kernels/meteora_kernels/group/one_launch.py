# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears for a few dozen tokens: every weight is read once, in one launch, and the output is rounded once.

:func:`one_launch_kernel` does for a few dozen tokens what :mod:`decode_chosen_rows` and :mod:`decode_all_rows` do for up to 16. The first programs of its
grid compute the gates and ``A x`` as float32 partial sums, route the tokens, and write the middle: ``A x``, masked and scaled. Meanwhile the other
programs read the base weights; then they add ``middle B`` and write the output. If a group has too few outputs to keep the GPU busy, the sum over h is cut
into pieces that are exchanged through memory. A program that needs a whole sum adds the pieces in a fixed order. There are no floating-point atomics, so
two runs are bit-equal.

The time of a program is the time to read its weights, which depends on how many bytes are in flight. Reads of 256 bytes per row or more are fastest, and one
program should take all shared memory of a multiprocessor. The programs of gates and base together should be at most as many as there are multiprocessors,
or fill two waves.

Waiting order: the programs of one member's gates wait for each other, the pieces of one tile of the output wait for each other, and all tiles wait for the
gates. Programs start in the order of the grid. The gates come first and are at most as many as there are multiprocessors (:func:`can_run`), so all of
them run at the same time and finish without waiting for other programs. Consider the first unfinished tile: the tiles before it have finished and those
after it start later, so its pieces are running or start next. Therefore no program waits forever, for any number of pieces.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from meteora_kernels.arguments import choice_constants, or_any, three
from meteora_kernels.device.flags import clear_when_last, count_out, raise_flag, share_out, wait_flag
from meteora_kernels.device.routing import coefficients_of, keep_routes, routes_of_tile, summed
from meteora_kernels.plan.machine import at_once, interpreted, why_not_at_once
from meteora_kernels.plan.table import Case, Row, why_not_one_tile
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.types import WHOLE, Adapters, Form, Group, Routing

_FIRST_TILE = tl.constexpr(8)
"""The first of the flags that count the pieces of every tile of outputs. Flags 0 to 2 count, for each member, the gate programs that have stored their sums,
flags 3 to 5 those whose tokens are routed, and flag 6 all programs that no longer read flags."""


@triton.jit
def write_middle(
    products, stride_split, stride_products, gate_rows, middle, stride_middle, allowed, scaling, offsets, chosen, tokens_total, count, rank, temperature,
    block, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Route the ``block``-th BLOCK tokens and write ROWS columns of the middle.

    A column is ``A x`` times ``w_j s_j`` where slot j's adapter owns the row, and 0 elsewhere and past the rank. CHUNK columns are computed at a time; CHUNK
    should be as large as registers allow, because every chunk waits for the loads of the one before.
    """
    tokens = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = tokens < tokens_total
    picks, shares = routes_of_tile(
        products, tokens, stride_products, allowed, products, products, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, False, stride_split, SPLITS
    )
    keep_routes(chosen, tokens, mask, picks, shares, TOP_K, SLOTS, KEEP)
    scaled = shares * tl.load(scaling + picks)
    first = tl.load(offsets + picks)
    last = tl.load(offsets + picks + 1)
    for start in tl.static_range(0, ROWS, CHUNK):
        rows = start + tl.arange(0, CHUNK)[None, :]
        values = summed(products + gate_rows, tokens * stride_products + rows, stride_split, mask & (rows < rank), SPLITS, True)
        factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
        # NaN times 0 is NaN, so rows that no token chose are set to 0 by selection. Rows with a NaN route stay NaN.
        values = tl.where(factor == 0.0, 0.0, values * factor)
        tl.store(middle + tokens * stride_middle + rows, values.to(middle.dtype.element_ty), mask=mask & (rows < ROWS))


@triton.jit
def add_up(
    total, middle, stride_middle, b, width, rank, columns, live,
    TOKENS_P: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 ``total`` (C, TOKENS_P) plus ``b[:, columns]^T middle^T``, with columns (1, C), b (R, width) and middle (TOKENS_P, R)."""
    tokens = tl.arange(0, TOKENS_P)[:, None]
    for chunk in tl.range(CHUNKS, num_stages=5):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(middle + tokens * stride_middle + rows[None, :], mask=live, other=0.0, cache_modifier=".cg")
        up = tl.load(b + rows[:, None] * width + columns, mask=(rows[:, None] < rank) & (columns < width), other=0.0)
        total = tl.dot(up.T, values.T, total, input_precision=PRECISION)
    return total


@triton.jit
def sum_of_steps(total, rows, x, row, piece, pieces, hidden, STEP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` (BN, TOKENS_P) plus the products of rows and tokens over a part of their columns, the ``piece``-th of ``pieces``.

    ``rows`` and ``x`` are tensor descriptors with blocks (BN, STEP), of which the one from ``row`` on is read, and (TOKENS_P, STEP).
    """
    steps = tl.cdiv(hidden, STEP)
    for step in tl.range(steps * piece // pieces, steps * (piece + 1) // pieces, num_stages=STAGES):
        total = tl.dot(rows.load([row, step * STEP]), x.load([0, step * STEP]).T, total, input_precision=PRECISION)
    return total


@triton.jit
def one_launch_kernel(
    x, packed, eight, base, scale, x_scale, b, bias, allowed, scaling, offsets, chosen, products, middle, parts, flags, y, tokens_total, hidden, outputs, count,
    gate_rows, stacked, rank, width0, width1, width2, temperature,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, TOKENS_P: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATE_PIECES: tl.constexpr, PIECES: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    WIDE: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CONCURRENT: tl.constexpr, THREADS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, EIGHT: tl.constexpr, SCALES: tl.constexpr, X_SCALES: tl.constexpr,
):  # fmt: skip
    """A group of up to three linears that share x, base and adapters, in one launch.

    Shapes: x (M, h), M <= TOKENS_P, and packed (P, h), tensor descriptors with blocks (TOKENS_P, BK) and (BN, BK); packed holds the O base rows of all members,
    then for each member N gate rows, padding to ``gate_rows``, R rows of A, padding to ``stacked``; b (R, width) for each member; bias (O,); y (M, O).
    EIGHT > 0: packed does not hold base rows. They are those of ``base`` (O, h), float8, and are multiplied with ``eight`` (M, h), float8; both are tensor
    descriptors with blocks of EIGHT columns. Their factors are ``scale`` float32 (O,) if SCALES is 1, else (1,), and ``x_scale``, (M,) if X_SCALES is 1, else
    (1,).
    Scratch: products float32 (GATE_PIECES, TOKENS_P, MEMBERS * (gate_rows + R)), partial sums of logits and A x; middle (TOKENS_P, MEMBERS * CHUNKS * CHUNK) in
    the dtype of b; parts float32 (tiles, PIECES, BN, TOKENS_P) if PIECES > 1. flags int32 (1024,), all 0 before and after.
    KEEP: the routes are written to ``chosen`` (``Routing.chosen``).
    Grid, one dimension: for each member ceil((gate_rows + R) / BN) * GATE_PIECES programs for gates and A; then for each member ceil(width / BN) * PIECES
    programs. SHARES, a power of two up to PIECES, is the number of a tile's programs that each write a part of it. Sums are (outputs, tokens), because the
    matrix units need at least 64 rows on the left side, but any multiple of 8 on the right, so fewer tokens take less time.
    """
    pid = tl.program_id(0)
    width_products = gate_rows + rank
    per_member = tl.cdiv(width_products, BN) * GATE_PIECES
    gate_programs = per_member * MEMBERS
    is_gate = pid < gate_programs
    index = (pid - gate_programs) // PIECES
    tile = tl.where(is_gate, (pid % per_member) // GATE_PIECES, index)
    piece = tl.where(is_gate, pid % GATE_PIECES, (pid - gate_programs) % PIECES)
    member = tl.where(is_gate, pid // per_member, 0)
    before = tl.where(is_gate, (0 if EIGHT else outputs) + member * stacked, 0)
    width = tl.where(is_gate, width_products, width0)
    if MEMBERS > 1:
        tiles0 = tl.cdiv(width0, BN)
        if (not is_gate) & (tile >= tiles0):
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
    pieces = tl.where(is_gate, GATE_PIECES, PIECES)
    row = before + tile * BN
    total = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
    if EIGHT == 0:
        total = sum_of_steps(total, packed, x, row, piece, pieces, hidden, BK, STAGES, PRECISION)
    elif is_gate:
        total = sum_of_steps(total, packed, x, row, piece, GATE_PIECES, hidden, BK, STAGES, PRECISION)
    else:
        total = sum_of_steps(total, base, eight, row, piece, PIECES, hidden, EIGHT, STAGES, PRECISION)
        places = tile * BN + tl.arange(0, BN)[:, None]
        total *= tl.load(scale + (before + places) * SCALES, mask=places < width, other=0.0)
        along = tl.arange(0, TOKENS_P)[None, :]
        total *= tl.load(x_scale + along * X_SCALES, mask=along < tokens_total, other=0.0)
    tokens = tl.arange(0, TOKENS_P)[:, None]
    columns = tl.arange(0, BN)[None, :]
    live = tokens < tokens_total
    across = tile * BN + columns
    stride_middle = MEMBERS * CHUNKS * CHUNK
    inner = middle + member * (CHUNKS * CHUNK)
    if is_gate:
        here = products + member * width_products
        stride_products = width_products * MEMBERS
        stride_split = stride_products * TOKENS_P
        tl.store(here + piece * stride_split + tokens * stride_products + across, total.T, mask=live & (across < width_products))
        token_blocks = tl.cdiv(tokens_total, BLOCK)
        first, step = share_out(flags + member, per_member, pid % per_member, token_blocks, CONCURRENT)
        if CONCURRENT:
            wait_flag(flags + member, per_member)
        for block in range(first, token_blocks, step):
            write_middle(
                here, stride_split, stride_products, gate_rows, inner, stride_middle, allowed, scaling, offsets, chosen + member * tokens_total * (2 * TOP_K),
                tokens_total, count, rank, temperature, block, TOP_K, SLOTS, PADDED, BLOCK, WIDE, CHUNKS * CHUNK, GATE_PIECES, HAS_ALLOWED, KEEP,
            )  # fmt: skip
        raise_flag(flags + 3 + member)
        come = count_out(flags + 6, THREADS)
    elif PIECES == 1:
        up = b + before.to(tl.int64) * rank
        wait_flag(flags + 3 + member, per_member)
        come = count_out(flags + 6, THREADS)
        total = add_up(total, inner, stride_middle, up, width, rank, across, live, TOKENS_P, CHUNK, CHUNKS, PRECISION)
        result = total.T
        if HAS_BIAS:
            result += tl.load(bias + before + across, mask=across < width, other=0.0).to(tl.float32)
        tl.store(y + tokens * outputs + before + across, result.to(y.dtype.element_ty), mask=live & (across < width))
    else:
        up = b + before.to(tl.int64) * rank
        here = parts + index.to(tl.int64) * (PIECES * TOKENS_P * BN)
        along = tl.arange(0, TOKENS_P)[None, :]
        tl.store(here + piece * (TOKENS_P * BN) + tl.arange(0, BN)[:, None] * TOKENS_P + along, total)
        arrived = flags + _FIRST_TILE + index
        first, step = share_out(arrived, PIECES, piece, SHARES, CONCURRENT)
        come = tl.zeros([THREADS], dtype=tl.int32)
        if first < SHARES:
            wait_flag(flags + 3 + member, per_member)
        elif CONCURRENT:
            come = count_out(flags + 6, THREADS)
        # One iteration if CONCURRENT, because SHARES <= PIECES.
        for share in range(first, SHARES, step):
            some = share * (BN // SHARES) + tl.arange(0, BN // SHARES)
            places = tile * BN + some[None, :]
            sums = tl.zeros([BN // SHARES, TOKENS_P], dtype=tl.float32)
            # B is added first, while the other pieces arrive.
            sums = add_up(sums, inner, stride_middle, up, width, rank, places, live, TOKENS_P, CHUNK, CHUNKS, PRECISION)
            if CONCURRENT:
                wait_flag(arrived, PIECES)
                come = count_out(flags + 6, THREADS)
            sums += summed(here, some[:, None] * TOKENS_P + along, TOKENS_P * BN, along < tokens_total, PIECES, True)
            result = sums.T
            if HAS_BIAS:
                result += tl.load(bias + before + places, mask=places < width, other=0.0).to(tl.float32)
            tl.store(y + tokens * outputs + before + places, result.to(y.dtype.element_ty), mask=live & (places < width))
        if not CONCURRENT:
            come = count_out(flags + 6, THREADS)
    clear_when_last(flags, come, THREADS)


def gate_programs_of(members: int, gate_rows: int, rank: int, row: Row) -> int:
    """The number of programs that compute gates and A."""
    assert row.tile is not None
    return members * ceil_div(gate_rows + rank, row.tile.outputs) * row.gate_pieces


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can. All gate programs must run at the same time."""
    facts = case.facts
    reason = why_not_one_tile(case, row)
    if reason is not None:
        return reason
    return why_not_at_once(facts.device, gate_programs_of(len(facts.widths), gate_rows_of(facts.adapters), facts.total_rank, row))


class Eight(NamedTuple):
    """Base weights and an input in 8-bit floating-point numbers.

    Attributes:
        weights: float8 (O, h), columns contiguous, rows aligned to 16 bytes.
        scale: Factor of the weights, float32 (O,) or (1,), contiguous.
        x: Input, float8 (M, h), with the alignment of the weights.
        x_scale: Factor of the input, float32 (M,) or (1,), contiguous.
    """

    weights: Tensor
    scale: Tensor
    x: Tensor
    x_scale: Tensor


class Rows(Protocol):
    """The part of :class:`meteora_kernels.Group` that :func:`launch` reads."""

    @property
    def packed(self) -> Tensor: ...
    @property
    def adapters(self) -> Adapters: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def flags(self) -> Tensor: ...
    @property
    def gate_rows(self) -> int: ...


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears for a few dozen tokens, base and adapters together: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous, 1 <= M <= ``tile.tokens``, float16 or bfloat16, rows aligned to 16 bytes.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table: ``gate_pieces`` is the number of pieces of the sums for gates and A, ``pieces`` that of the sums for base outputs (fewer
            are used if they would not all run at the same time). The path reads ``tokens``, ``outputs``, ``step``, ``warps`` and ``stages`` of its tile.
        form: Ignored by this path.
    """
    return launch(x, group, routing, row)


def launch(x: Tensor, group: Rows, routing: Routing, row: Row, eight: Eight | None = None) -> Tensor:
    """:func:`run`, where with ``eight`` the base is in 8-bit numbers and ``group.packed`` holds gates and A alone."""
    assert row.tile is not None
    tokens, hidden = x.shape
    adapters, gate_rows, packed = group.adapters, group.gate_rows, group.packed
    rank = adapters.total_rank
    _, _, b, scaling, offsets, _, widths, stacked = adapters
    members, outputs, gate_pieces = len(widths), sum(widths), row.gate_pieces
    tokens_p, bn, bk, warps, stages = row.tile[:5]
    tiles = sum(ceil_div(width, bn) for width in widths)
    gate_programs = gate_programs_of(members, gate_rows, rank, row)
    pieces = max(1, min(row.pieces, (at_once(x.device) - gate_programs) // tiles))
    block = max(1, power_of_two(ceil_div(tokens_p * members, gate_programs)))
    chunk, chunks = 32, ceil_div(rank, 32)
    products = torch.empty(gate_pieces, tokens_p, members * (gate_rows + rank), dtype=torch.float32, device=x.device)
    middle = torch.empty(tokens_p, members * chunks * chunk, dtype=x.dtype, device=x.device)
    parts = torch.empty(tiles, pieces, bn, tokens_p, dtype=torch.float32, device=x.device) if pieces > 1 else products
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    step = 0 if eight is None else 2 * bk  # as many bytes as a step of 16-bit numbers
    one_launch_kernel[(gate_programs + tiles * pieces,)](
        TensorDescriptor(x, [tokens, hidden], [x.stride(0), 1], [tokens_p, bk]),
        TensorDescriptor(packed, [packed.shape[0], hidden], [packed.stride(0), 1], [bn, bk]),
        None if eight is None else TensorDescriptor(eight.x, [tokens, hidden], [eight.x.stride(0), 1], [tokens_p, step]),
        None if eight is None else TensorDescriptor(eight.weights, [outputs, hidden], [eight.weights.stride(0), 1], [bn, step]),
        None if eight is None else eight.scale, None if eight is None else eight.x_scale, b, or_any(group.bias, scaling),
        or_any(routing.allowed, scaling), scaling, offsets, or_any(routing.chosen, scaling), products, middle, parts, group.flags, y, tokens, hidden, outputs,
        scaling.shape[0], gate_rows, stacked, rank, *three(widths), routing.temperature, **choice_constants(adapters, routing), MEMBERS=members,
        TOKENS_P=tokens_p, BN=bn, BK=bk, GATE_PIECES=gate_pieces, PIECES=pieces, SHARES=1 << (pieces.bit_length() - 1), BLOCK=block, CHUNK=chunk, CHUNKS=chunks,
        WIDE=min(power_of_two(chunks * chunk), max(chunk, min(256, 2048 // block))), HAS_BIAS=group.bias is not None, KEEP=routing.chosen is not None,
        CONCURRENT=not interpreted(), THREADS=32 * warps, STAGES=stages, PRECISION="ieee", EIGHT=step,
        SCALES=int(eight is not None and eight.scale.numel() > 1), X_SCALES=int(eight is not None and eight.x_scale.numel() > 1), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip  # fmt: skip
    return y
