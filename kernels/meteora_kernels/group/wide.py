"""Gates and A, then base and B in one library product for each window (:mod:`meteora_kernels.wide`); the output is rounded once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from meteora_kernels.group import wide_before
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.steps.middle import Out, middle
from meteora_kernels.steps.products import library_products, products, products_by, right_of
from meteora_kernels.types import Group, Routing


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
    return wide_before.can_run(case, row) if row.gate_pieces else None


def run(x: Tensor, group: Group, routing: Routing, row: Row, *, in_place: bool = False) -> Tensor:
    """Outputs of a group of linears, base and adapters together: (M, O), in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears, with ``wide``.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table. With ``gate_pieces``, one launch does everything before the product (:mod:`wide_before`); otherwise ``pieces`` and ``tile``
            describe the product with gates and A, which also copies x if there is a tile.
        in_place: Whether x is a window of the buffer already, so that it is not copied.
    """
    tokens, outputs, plan = x.shape[0], group.weights.shape[0], plan_of(group)
    rows = before(x, group, routing, row, in_place=in_place)
    y, origin = x.new_empty(tokens, outputs), rows.storage_offset()
    for begin, columns, weights, start, _, _ in plan.windows:
        left = rows.as_strided((tokens, columns), (plan.row, 1), origin + begin)
        torch.mm(left, weights, out=y.as_strided((tokens, weights.shape[1]), (outputs, 1), start))
    return y if group.bias is None else y.add_(group.bias)


def run_members(x: Tensor, group: Group, routing: Routing, row: Row, *, in_place: bool = False) -> list[Tensor]:
    """:func:`run` with the outputs of every member as a separate tensor (..., o) for x (..., h), whose rows all have the same distance."""
    shape, plan = x.shape[:-1], plan_of(group)
    tokens = shape.numel()
    rows = before(x, group, routing, row, in_place=in_place)
    found, origin = [], rows.storage_offset()
    for begin, columns, weights, _, widths, bias in plan.windows:
        y = torch.mm(rows.as_strided((tokens, columns), (plan.row, 1), origin + begin), weights)
        if bias is not None:
            y.add_(bias)
        if len(widths) == 1:
            found.append(y.view(*shape, widths[0]))
        elif len(shape) == 2:
            total = sum(widths)
            strides = (shape[1] * total, total, 1)
            found.append(y.as_strided((*shape, widths[0]), strides, 0))
            found.append(y.as_strided((*shape, widths[1]), strides, widths[0]))
        else:
            found.extend(y.view(*shape, -1).split_with_sizes(widths, -1))
    return found


def before(x: Tensor, group: Group, routing: Routing, row: Row, *, in_place: bool) -> Tensor:
    """Compute h, and copy x if it is not in a buffer yet. Returns the columns of x in the buffer.

    Args:
        x: Input (..., h), columns contiguous, all rows at the same distance.
        group, routing, row, in_place: The arguments of :func:`run`.
    """
    wide, adapters, plan = group.wide, group.adapters, plan_of(group)
    assert wide is not None
    rows = x if in_place else wide.new_rows(x.shape, x)
    out = Out(rows, plan.first, plan.second, plan.pad)
    if row.gate_pieces:
        wide_before.run(x, group, routing, row, out, None if in_place else rows)
        return rows
    copied = not in_place and row.tile is not None
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
    if not in_place and not copied:
        copy_rows(x, rows)
    return rows


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy rows (..., h), all at the same distance, 16 bytes at a time where both are aligned to that: PyTorch's kernel for rows with gaps moves one number
    at a time."""
    size = source.element_size()
    numbers = [number * size for each in (source, target) for number in (each.storage_offset(), *each.stride()[:-1], each.shape[-1])]
    if not (source.data_ptr() | target.data_ptr()) % 16 and not any(number % 16 for number in numbers):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


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
