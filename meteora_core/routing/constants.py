"""Small tensors that name adapters, each made once and copied once to a device."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Constants:
    """The tensors of one model. A captured CUDA graph reads them where they were at its capture and cannot copy from the host; so they stay in place.

    Copies and pickles are empty: a tensor is made again where it is needed.
    """

    def __init__(self) -> None:
        self._singles: dict[int, Tensor] = {}
        self._masks: dict[frozenset[int], Tensor] = {}
        self._copies: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()

    def single(self, adapter: int) -> Tensor:
        """int64 (1,): one adapter."""
        if adapter not in self._singles:
            with torch.inference_mode(False):
                self._singles[adapter] = torch.tensor([adapter])
        return self._singles[adapter]

    def all_but(self, muted: frozenset[int], count: int) -> Tensor:
        """bool (count,): False for the muted adapters."""
        if muted not in self._masks:
            with torch.inference_mode(False):
                self._masks[muted] = torch.tensor([adapter not in muted for adapter in range(count)])
        return self._masks[muted]

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor on a device; copied by the first call, not by every layer."""
        if tensor.device == device or torch.compiler.is_compiling():
            return tensor.to(device)
        copies = self._copies.setdefault(tensor, {})
        if device not in copies:
            with torch.inference_mode(False):
                copies[device] = tensor.to(device)
        return copies[device]
