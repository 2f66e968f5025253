"""Small tensors of adapter indices and masks, each created once and copied once to every device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from meteora_core.routing.options import RowRoutes

KEPT = 64
"""Number of batches of routing options whose tensors are kept for the next call."""


class Constants:
    """The small constant tensors of one model.

    A captured CUDA graph reads a tensor at its address during the capture and cannot copy from the host, so the tensors are kept and never moved.
    Copies and pickles of this object are empty; they create their tensors again.
    """

    def __init__(self) -> None:
        self._singles: dict[int, Tensor] = {}
        self._masks: dict[frozenset[int], Tensor] = {}
        self._rows: dict[Hashable, RowRoutes] = {}
        self._copies: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()

    def single(self, adapter: int) -> Tensor:
        """The index of one adapter, int64 (1,), on the CPU."""
        if adapter not in self._singles:
            with torch.inference_mode(False):
                self._singles[adapter] = torch.tensor([adapter])
        return self._singles[adapter]

    def all_but(self, muted: frozenset[int], count: int) -> Tensor:
        """A mask over ``count`` adapters, bool (count,), on the CPU: False for the muted adapters."""
        if muted not in self._masks:
            with torch.inference_mode(False):
                self._masks[muted] = torch.tensor([adapter not in muted for adapter in range(count)])
        return self._masks[muted]

    def rows(self, key: Hashable, make: Callable[[], RowRoutes]) -> RowRoutes:
        """The tensors of a batch's routing options; an equal key returns the same object for as long as it is among the last :data:`KEPT`.

        A captured CUDA graph that reads the tensors must keep the object.
        """
        found = self._rows.pop(key, None)
        self._rows[key] = found = make() if found is None else found
        while len(self._rows) > KEPT:
            del self._rows[next(iter(self._rows))]
        return found

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor on a device. Only the first call for a tensor and a device copies it."""
        if tensor.device == device or torch.compiler.is_compiling():
            return tensor.to(device)
        copies = self._copies.setdefault(tensor, {})
        if device not in copies:
            with torch.inference_mode(False):
                copies[device] = tensor.to(device)
        return copies[device]
