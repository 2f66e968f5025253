"""Memory for the inputs of a fused group, in the form in which its prefill kernel reads them."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from meteora_core.routing import Meteora
from meteora_kernels import Group
from meteora_kernels.operators import eager


class Inputs:
    """Allocates memory for the next input of a group, and recognises this memory when the group is called with it.

    In prefill, a group multiplies ``[x, h]`` by ``[W, B^T]``, where ``h`` is the routed and scaled ``A x``. The allocated rows have additional columns for
    h, so that x does not have to be copied (:mod:`meteora_kernels.wide`).

    Args:
        group: The weights of the group.
        state: Routing state of the model; its top-k determines which kernels run.
    """

    def __init__(self, group: Group, state: Meteora) -> None:
        self._group, self._state = group, state
        self._last: weakref.ref[Tensor] | None = None

    def new(self, shape: torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor for the group's next input, of shape ``shape`` (..., h), in the dtype and on the device of ``like``."""
        from meteora_kernels.group import reads_in_place  # needs Triton

        tokens, wide = shape[:-1].numel(), self._group.wide
        rows = self._state.mode.rows
        top_k = self._state.routing.top_k if rows is None or rows.grouped is None else rows.grouped.top_k
        if wide is None or not reads_in_place(self._group, tokens, top_k):
            return like.new_empty(shape)
        new = wide.new_rows(shape, like)
        self._last = weakref.ref(new)
        return new

    def owns(self, x: Tensor) -> bool:
        """Whether ``x`` (..., h) is the tensor that :meth:`new` returned last, or a view of all of it; False while a compiler traces."""
        last, wide = None if self._last is None else self._last(), self._group.wide
        if last is None or wide is None or not eager(x):
            return False
        # While the last tensor exists, no other tensor has its address.
        if x is last or x.data_ptr() != last.data_ptr() or x.numel() != last.numel():
            return x is last
        return x.stride() == (wide.row, 1) or (x.shape == last.shape and x.stride() == last.stride())
