"""The memory layout that turns B into further input columns of W: ``y = [x, h] [W, B^T]^T``, where ``h`` is the routed, scaled ``A x``.

x is written into a buffer of rows ``[h_0 | x | h_1 ...]`` (:class:`Wide`), so that the ``[x, h]`` of every product is a window of the buffer and nothing
has to be copied::

    one member       [ x | h_0 ]                        window: all of it
    two members      [ h_0 | x | h_1 ]                  windows: h_0 to x, x to h_1
    three members    [ h_0 | x | h_1 | h_2 ]            windows: h_0 to x, x to h_2 (both last members at once)

The row stride of the group's block of weights is the input width plus the columns to the right of x. B^T of a member is in the same rows as its W, on the
same side as h in its window. In memory, the columns to the right of one row are the columns to the left of the next. No row needs both, so two members need
no more memory per row than one member.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 64
"""The columns of h are padded to a multiple of this number, so that rows of 16-bit numbers stay aligned to 128 bytes."""


SHARE = 8
"""A group keeps B^T in the rows of its weights if it adds at most one column for this number of input columns."""


@dataclass(frozen=True, slots=True)
class Wide:
    """Columns and strides of one group.

    Attributes:
        hidden: Width of the input.
        rank: Sum of the adapters' ranks R.
        members: Number of linears, 1 to 3.
    """

    hidden: int
    rank: int
    members: int

    def pays(self, dtype: torch.dtype) -> bool:
        """Whether a fused group should keep B^T in the rows of its weights: for 16-bit dtypes, and if R is small compared with the input width."""
        return dtype in (torch.float16, torch.bfloat16) and self.right * SHARE <= self.hidden

    @property
    def pad(self) -> int:
        """The number of columns of one member's h: R rounded up to a multiple of :data:`ALIGNED`."""
        return -(-self.rank // ALIGNED) * ALIGNED

    @property
    def left(self) -> int:
        """The number of columns to the left of x."""
        return 0 if self.members == 1 else self.pad

    @property
    def right(self) -> int:
        """The number of columns to the right of x."""
        return self.pad * max(1, self.members - 1)

    @property
    def row(self) -> int:
        """The number of columns of a row of the buffer that holds x."""
        return self.left + self.hidden + self.right

    @property
    def weight_row(self) -> int:
        """The row stride of the block of weights, in elements."""
        return self.hidden + self.right

    @property
    def places(self) -> tuple[int, int]:
        """The first column of the first member's h, and that of the second member's h, which the third member's h follows."""
        return (0 if self.left else self.hidden), self.left + self.hidden

    def new_block(self, rows: int, like: Tensor) -> Tensor:
        """A zeroed block (rows, hidden) with row stride ``weight_row``, in the dtype and on the device of ``like``."""
        memory = torch.zeros(self.left + rows * self.weight_row, dtype=like.dtype, device=like.device)
        return memory.as_strided((rows, self.hidden), (self.weight_row, 1), self.left)

    def new_rows(self, shape: int | torch.Size, like: Tensor) -> Tensor:
        """The columns for x of a new, uninitialised buffer in the dtype and on the device of ``like``, in the shape (..., hidden), or (M, hidden) for an M."""
        row = self.row
        if isinstance(shape, int):
            return like.new_empty(shape, row).as_strided((shape, self.hidden), (row, 1), self.left)
        if len(shape) == 3:
            return like.new_empty(shape[0] * shape[1], row).as_strided(shape, (shape[1] * row, row, 1), self.left)
        return self.new_rows(shape[:-1].numel(), like).view(shape)

    def whole(self, x: Tensor) -> Tensor:
        """The whole buffer (M, row) that contains the columns ``x``."""
        return x.as_strided((x.shape[0], self.row), (self.row, 1), x.storage_offset() - self.left)

    def fits(self, packed: Tensor) -> bool:
        """Whether a group's block has the columns for B^T."""
        return packed.stride(0) == self.weight_row

    def windows(self, packed: Tensor, widths: list[int]) -> Iterator[tuple[slice, Tensor, slice]]:
        """For each product: the columns of the buffer, the weights (o, columns) to multiply them by, and the columns of the output."""
        sizes = [widths[0]] if self.members == 1 else [widths[0], sum(widths[1:])]
        row = 0
        for index, size in enumerate(sizes):
            begin, end = (0, self.left + self.hidden) if index == 0 and self.left else (self.left, self.row)
            origin = packed.storage_offset() - self.left + row * self.weight_row + begin
            yield slice(begin, end), packed.as_strided((size, end - begin), (self.weight_row, 1), origin), slice(row, row + size)
            row += size

    def place_up(self, packed: Tensor, up: Tensor, widths: list[int]) -> None:
        """Copy every member's B (R, width), which follow one another in ``up``, transposed into its columns of the block."""
        row = 0
        for member, width in enumerate(widths):
            column = self.places[0] if member == 0 else self.places[1] + (member - 1) * self.pad
            origin = packed.storage_offset() - self.left + row * self.weight_row + column
            place = packed.as_strided((width, self.rank), (self.weight_row, 1), origin)
            place.copy_(up[row * self.rank : (row + width) * self.rank].view(self.rank, width).t())
            row += width
