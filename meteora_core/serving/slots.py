"""The keys and values of the requests that are in progress."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_CAPACITY = 256
"""Number of columns that are allocated at first."""

Columns = list[Tensor]
"""Some columns of a slot in all layers: the keys and values of equal shape as one tensor (tensors, heads, columns, width)."""


class Slots:
    """Keys and values of up to ``count`` requests; slot ``i`` holds the tokens of one request from column 0.

    Args:
        count: Number of slots.
        longest: Maximum number of columns.

    Attributes:
        capacity: Number of columns that are allocated; it grows as needed.
        allocation: Counter of allocations; addresses of keys and values change with it.
    """

    def __init__(self, count: int, longest: int) -> None:
        self.count, self.longest = count, longest
        self.capacity = min(FIRST_CAPACITY, longest)
        self.allocation = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Number of allocated bytes."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._layers.values() for tensor in pair)

    @property
    def ready(self) -> bool:
        """Whether a forward pass has allocated the layers."""
        return bool(self._layers)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, each (slots, heads, columns, width), allocated like ``key`` and ``value`` (heads, tokens, width)."""
        if index not in self._layers:
            self._layers[index] = self._new(key, self.capacity), self._new(value, self.capacity)
        return self._layers[index]

    def _new(self, like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros(self.count, like.shape[-3], capacity, like.shape[-1])

    def reserve(self, columns: int) -> None:
        """Allocate at least ``columns`` columns, and keep what is stored."""
        if columns <= self.capacity:
            return
        capacity = min(self.longest, max(columns, 2 * self.capacity))
        for index, pair in self._layers.items():
            wider = tuple(self._new(tensor, capacity) for tensor in pair)
            for new, old in zip(wider, pair, strict=True):
                new[:, :, : self.capacity] = old
            self._layers[index] = wider[0], wider[1]
        self.capacity = capacity
        self.allocation += 1

    def shrink(self) -> None:
        """Free the memory of all slots. Nothing may be stored in them."""
        self._layers.clear()
        self.capacity = min(FIRST_CAPACITY, self.longest)
        self.allocation += 1

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` columns of one slot to another."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` columns of two slots."""
        for pair in self._layers.values():
            for tensor in pair:
                kept = tensor[one, :, :length].clone()
                tensor[one, :, :length] = tensor[other, :, :length]
                tensor[other, :, :length] = kept

    def read(self, slot: int, start: int, end: int) -> Columns:
        """A copy of the columns from ``start`` to ``end`` of a slot."""
        return [torch.stack([tensor[slot, :, start:end] for tensor in alike]) for alike in self._alike()]

    def write(self, slot: int, start: int, columns: Columns) -> None:
        """Store columns, as :meth:`read` returns them, from column ``start`` on."""
        for alike, stack in zip(self._alike(), columns, strict=True):
            torch._foreach_copy_([tensor[slot, :, start : start + stack.shape[2]] for tensor in alike], list(stack.unbind()))

    def _alike(self) -> list[list[Tensor]]:
        """The keys and values of all layers, in groups of equal shape, always in the same order."""
        groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        for _, pair in sorted(self._layers.items()):
            for tensor in pair:
                groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(tensor)
        return list(groups.values())


def nbytes(columns: Columns) -> int:
    """Number of bytes of columns that :meth:`Slots.read` returned."""
    return sum(stack.numel() * stack.element_size() for stack in columns)


def joined(blocks: Sequence[Columns]) -> Columns:
    """Concatenate blocks of columns."""
    return [torch.cat(stacks, 2) for stacks in zip(*blocks, strict=True)]
