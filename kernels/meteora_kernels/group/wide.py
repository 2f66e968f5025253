# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Gates and A, then base and B in one library product for each window (:mod:`meteora_kernels.wide`); the output is rounded once.

Everything before the product can be one launch: gates and ``A x``, routing, and h, written into the buffer that the product reads. If x is not in that
buffer yet, the programs that multiply x also copy it. Every program computes a tile of ``[G; A] x`` over one piece of x's columns and stores it as float32.
When all tiles and pieces of a block of tokens and a member have been stored, their programs divide the tokens among themselves, route them, and write h.
Pieces are added in a fixed order and there are no floating-point atomics, so two runs are bit-equal.

Waiting order: only the programs of one block of tokens and one member wait for each other. They are neighbours in the grid and at most as many as the GPU
runs at the same time (:func:`can_launch_before`), so those of the first unfinished block are all running or start next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
from meteora_kernels.plan.machine import UNREADABLE, interpreted, why_not_at_once
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.sizes import ceil_div
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.steps.middle import Out, middle, ranks_of
from meteora_kernels.steps.products import library_products, products, products_by, right_of
from meteora_kernels.types import WHOLE, Form, Group, Routing
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


class Plan(NamedTuple):
    """The numbers of :class:`meteora_kernels.wide.Wide` and the products of a group, which it keeps. Columns count from the first column of x.

    Attributes:
        first, second: First columns of the first and the second member's h.
        pad: Number of columns of one member's h.
        row: Number of columns of a row of the buffer.
        windows: The products of base and B.
    """

    first: int
    second: int
    pad: int
    row: int
    windows: list[Window]


class Window(NamedTuple):
    """One product of base and B.

    Attributes:
        begin: Its first column.
        columns: The number of its columns.
        weights: The transposed weights (columns, o).
        start: Its first column in the output.
        widths: The number of outputs of each member that it holds.
        bias: The bias of these outputs (o,), or None.
    """

    begin: int
    columns: int
    weights: Tensor
    start: int
    widths: tuple[int, ...]
    bias: Tensor | None


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    if not case.facts.wide:
        return "the group does not keep B^T in the rows of its weights"
    return can_launch_before(case, row) if row.gate_pieces else None


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor | list[Tensor]:
    """Outputs of a group of linears, base and adapters together, in the dtype of x: (M, O), or a list of the members' outputs (..., o) with ``form.apart``.

    Args:
        x: Input (..., h), columns contiguous, all rows at the same distance.
        group: The group of linears, with ``wide``.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table. With ``gate_pieces``, one launch does everything before the product (:func:`launch_before`); otherwise ``pieces`` and ``tile``
            describe the product with gates and A, which also copies x if there is a tile.
        form: Whether x is a window of the buffer already, so that it is not copied; and whether outputs are separate tensors, which saves the views
            through which the products write into one.
    """
    shape, plan = x.shape[:-1], plan_of(group)
    tokens, found = shape.numel(), []
    rows = before(x, group, plan, routing, row, in_place=form.in_place)
    origin, whole = rows.storage_offset(), None if form.apart else x.new_empty(tokens, group.weights.shape[0])
    for begin, columns, weights, start, widths, bias in plan.windows:
        left = rows.as_strided((tokens, columns), (plan.row, 1), origin + begin)
        if whole is not None:
            y = torch.mm(left, weights, out=whole[:, start : start + weights.shape[1]])
        else:
            y = torch.mm(left, weights)
            if len(widths) == 1:
                found.append(y.view(*shape, widths[0]))
            else:
                found += two_of(y, shape, widths)
        if bias is not None:
            y.add_(bias)
    return found if whole is None else whole


def two_of(y: Tensor, shape: torch.Size, widths: tuple[int, ...]) -> Sequence[Tensor]:
    """The columns of two members in a contiguous product (M, o), as tensors of the shape ``shape`` and the member's width."""
    if len(shape) == 2:  # takes less time than a split
        first, second = widths
        strides = (shape[1] * (first + second), first + second, 1)
        return y.as_strided((*shape, first), strides, 0), y.as_strided((*shape, second), strides, first)
    return y.view(*shape, -1).split_with_sizes(widths, -1)


def before(x: Tensor, group: Group, plan: Plan, routing: Routing, row: Row, *, in_place: bool) -> Tensor:
    """Compute h, and copy x if it is not in a buffer yet. Returns the columns of x in the buffer.

    Args:
        x: Input (..., h), columns contiguous, all rows at the same distance.
        group, routing, row: The arguments of :func:`run`.
        plan: The group's numbers and products.
        in_place: Whether x is in a buffer.
    """
    wide, adapters = group.wide, group.adapters
    assert wide is not None
    rows = x if in_place else wide.new_rows(x.shape, x)
    out = Out(rows, plan.first, plan.second, plan.pad)
    if row.gate_pieces:
        launch_before(x, group, routing, row, out, None if in_place else rows)
        return rows
    copied = not in_place and row.tile is not None
    if not in_place and not copied:
        copy_rows(x, rows)
    if row.tile is None and row.pieces:
        found = library_products(x, adapters.gate, row.pieces, right(group, row.pieces))
    else:
        flat = x if x.dim() == 2 else x.as_strided((x.shape[:-1].numel(), wide.hidden), (x.stride(-2), 1))
        found = (
            products(flat, adapters.gate, row.pieces, row.tile, rows.view_as(flat))
            if copied and row.tile is not None
            else products_by(row, flat, adapters.gate)
        )
    middle(found, group.gate_rows, adapters, routing, max_rank=adapters.max_rank or 0, out=out)
    return rows


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy rows (..., h), all at the same distance, 16 bytes at a time where both are aligned to that: PyTorch's kernel for rows with gaps moves one number
    at a time."""
    size = source.element_size()
    numbers = [number * size for each in (source, target) for number in (each.storage_offset(), *each.stride()[:-1], each.shape[-1])]
    if not (source.data_ptr() | target.data_ptr()) % 16 and not any(number % 16 for number in numbers):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


def can_launch_before(case: Case, row: Row) -> str | None:
    """The reason why :func:`launch_before` cannot run a case with a row of the table; None if it can.

    All programs that wait for each other must run at the same time, and the tokens must choose few of the rows of A.
    """
    facts, tile = case.facts, row.tile
    members = len(facts.widths)
    if not case.aligned:
        return UNREADABLE
    if tile is None or ceil_div(case.tokens, tile.tokens) * members > MOST_BLOCKS:
        return f"there are {case.tokens} tokens, more than there are flags for"
    if not ranks_of(facts.max_rank, case.top_k, Wide(facts.hidden, facts.total_rank, members).pad):
        return "the chosen rows are not few among those of A"
    return why_not_at_once(facts.device, ceil_div(gate_rows_of(facts.adapters) + facts.total_rank, tile.outputs) * row.gate_pieces)


_launches = Launches(wide_before_kernel, descriptors=2)


def launch_before(x: Tensor, group: Group, routing: Routing, row: Row, out: Out, copy: Tensor | None) -> None:
    """Compute gates, ``A x`` and routing of a group, and write h next to x. :func:`can_launch_before` must have returned None.

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


def right(group: Group, pieces: int) -> Tensor:
    """The right operand of the product with gates and A, which the group keeps."""
    found = group.views.get(pieces)
    if found is None:
        found = group.views[pieces] = right_of(group.adapters.gate, pieces)
    assert isinstance(found, Tensor)
    return found


def plan_of(group: Group) -> Plan:
    """The numbers and products of a group with ``wide``."""
    found: Plan | None = group.views.get("plan")
    if found is None:
        wide, widths, windows = group.wide, group.adapters.widths, list[Window]()
        assert wide is not None
        for columns, weights, place in wide.windows(group.packed, list(widths)):
            members = widths[1:] if windows else widths[:1]
            bias = None if group.bias is None else group.bias[place]
            windows.append(Window(columns.start - wide.left, columns.stop - columns.start, weights.t(), place.start, members, bias))
        first, second = wide.places
        found = group.views["plan"] = Plan(first - wide.left, second - wide.left, wide.pad, wide.row, windows)
    return found
