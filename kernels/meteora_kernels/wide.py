"""The layout in memory where B is an extension of K: ``y = [x, h] [W, B^T]^T`` with ``h`` the routed, scaled ``A x``.

x is written into a buffer of rows ``[h_0 | x | h_1 ...]`` (:class:`Wide`), so that the ``[x, h]`` of every product is a window of the buffer and nothing
is copied::

    one member       [ x | h_0 ]                        window: all of it
    two members      [ h_0 | x | h_1 ]                  windows: h_0 to x, x to h_1
    three members    [ h_0 | x | h_1 | h_2 ]            windows: h_0 to x, x to h_2 (both last members at once)

The rows of the group's block of weights are as far apart as h plus the columns to the right of x. B^T of a member is in the same rows as its W, to the left
or to the right of them as h is in its window. In memory, the columns to the right of one row are the columns to the left of the next, and no row
needs both, so a group of two costs no more than one of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 64
"""Columns of h are padded to a multiple of this, so that rows of 16-bit numbers stay 128 bytes aligned."""


SHARE = 8
"""A group keeps B^T in the rows of its weights where all columns for it are at most one in this many of h."""


@dataclass(frozen=True, slots=True)
class Wide:
    """Columns and strides of one group.

    Attributes:
        hidden: h.
        rank: R.
        members: 1 to 3.
    """

    hidden: int
    rank: int
    members: int

    def pays(self, dtype: torch.dtype) -> bool:
        """Whether a fused group should keep B^T in the rows of its weights: in 16 bits, and where R is small compared with h."""
        return dtype in (torch.float16, torch.bfloat16) and self.right * SHARE <= self.hidden

    @property
    def pad(self) -> int:
        """Columns of one member's h: R up to a multiple of :data:`ALIGNED`."""
        return -(-self.rank // ALIGNED) * ALIGNED

    @property
    def left(self) -> int:
        """Columns left of x."""
        return 0 if self.members == 1 else self.pad

    @property
    def right(self) -> int:
        """Columns right of x."""
        return self.pad * max(1, self.members - 1)

    @property
    def row(self) -> int:
        """Columns of a row of x's buffer."""
        return self.left + self.hidden + self.right

    @property
    def weight_row(self) -> int:
        """Elements from one row of the block of weights to the next."""
        return self.hidden + self.right

    @property
    def places(self) -> tuple[int, int]:
        """The first columns of the first member's h and of the second's, which the third's follows."""
        return (0 if self.left else self.hidden), self.left + self.hidden

    def new_block(self, rows: int, like: Tensor) -> Tensor:
        """A zeroed block (rows, h) whose rows are ``weight_row`` apart, in the dtype and where ``like`` is."""
        memory = torch.zeros(self.left + rows * self.weight_row, dtype=like.dtype, device=like.device)
        return memory.as_strided((rows, self.hidden), (self.weight_row, 1), self.left)

    def new_rows(self, tokens: int, like: Tensor) -> Tensor:
        """The columns (M, h) that are x's of a new buffer, in the dtype and where ``like`` is; nothing is written yet."""
        return like.new_empty(tokens, self.row)[:, self.left : self.left + self.hidden]

    def whole(self, x: Tensor) -> Tensor:
        """The buffer (M, row) around the columns that are x's."""
        return x.as_strided((x.shape[0], self.row), (self.row, 1), x.storage_offset() - self.left)

    def fits(self, packed: Tensor) -> bool:
        """Whether a group's block has the columns for B^T."""
        return packed.stride(0) == self.weight_row

    def windows(self, packed: Tensor, widths: list[int]) -> Iterator[tuple[slice, Tensor, slice]]:
        """Per product: which columns of x's buffer, times which rows (o, columns), gives which columns of the output."""
        sizes = [widths[0]] if self.members == 1 else [widths[0], sum(widths[1:])]
        row = 0
        for index, size in enumerate(sizes):
            begin, end = (0, self.left + self.hidden) if index == 0 and self.left else (self.left, self.row)
            origin = packed.storage_offset() - self.left + row * self.weight_row + begin
            yield slice(begin, end), packed.as_strided((size, end - begin), (self.weight_row, 1), origin), slice(row, row + size)
            row += size

    def place_up(self, packed: Tensor, up: Tensor, widths: list[int]) -> None:
        """Copy every member's B (R, width), one after the other in ``up``, into its columns of the block, transposed."""
        row = 0
        for member, width in enumerate(widths):
            column = self.places[0] if member == 0 else self.places[1] + (member - 1) * self.pad
            origin = packed.storage_offset() - self.left + row * self.weight_row + column
            place = packed.as_strided((width, self.rank), (self.weight_row, 1), origin)
            place.copy_(up[row * self.rank : (row + width) * self.rank].view(self.rank, width).t())
            row += width
