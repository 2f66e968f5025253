"""Copies of the base weights in oneDNN's layout, for servers on a CPU.

For a few tokens, PyTorch's usual product reads float32 weights at about half of the memory's bandwidth; with weights in oneDNN's layout, it reaches nearly the
full bandwidth (notes/lab/2026-11-30-serving.md). The copies take as much memory as the weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.memory import available_bytes

_log = logging.getLogger(__name__)

TOKENS = 8
"""The number of tokens for which the layout is optimised."""
EXACT, BLOCK = 16, 64
"""Up to EXACT tokens, and multiples of it up to BLOCK, are multiplied as they are; other numbers are filled up, and larger ones are split. oneDNN keeps half a
megabyte for each number of tokens and shape of weights, up to 1,024 of them."""
SPARE = 4
"""Weights are copied only if the available memory is larger than the copies by this factor."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight is kept in oneDNN's layout as well; it is used in inference with float32 input.

    It takes the place of another layer, and has the same parameters, buffers and hooks. Copies and pickles are copies and pickles of that layer.

    Args:
        own: The layer that is replaced.
    """

    own: nn.Linear

    def __init__(self, own: nn.Linear) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(own), own=own)  # shares the layer's dictionaries of parameters and hooks
        self._packed: Tensor | None = None
        self._source: tuple[int, int] = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or x.dtype != torch.float32 or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        parts: list[Tensor] = [
            torch.ops.mkldnn._linear_pointwise(block, self.packed(), self.bias, "none", [], "")[:count] for block, count in blocks(x.reshape(-1, x.shape[-1]))
        ]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.view(*x.shape[:-1], output.shape[-1])

    def packed(self) -> Tensor:
        """The weight in oneDNN's layout; it is computed again if the weight has changed."""
        weight = self.weight
        source = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or source != self._source:
            self._packed, self._source = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS), source
        assert self._packed is not None
        return self._packed

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, also in oneDNN's layout"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return copy.deepcopy(self.own, memo)

    def __reduce__(self) -> tuple[Callable[[nn.Linear], nn.Linear], tuple[nn.Linear]]:
        return _unchanged, (self.own,)


def blocks(rows: Tensor) -> list[tuple[Tensor, int]]:
    """Split (M, in) into blocks of few different sizes.

    Returns:
        The blocks, each with the number of its rows that are not zeros at its end.

    Example:
        >>> [(tuple(block.shape), count) for block, count in blocks(torch.ones(90, 3))]
        [((64, 3), 64), ((32, 3), 26)]
    """
    found = []
    for begin in range(0, max(len(rows), 1), BLOCK):
        block = rows[begin : begin + BLOCK]
        count = len(block)
        found.append((F.pad(block, (0, 0, 0, -count % EXACT)) if count > EXACT and count % EXACT else block, count))
    return found


def pack_weights(model: nn.Module) -> int:
    """Replace the float32 linear layers inside a model on a CPU by :class:`PackedLinear`, if the memory suffices.

    Results differ by rounding. :func:`unpack_weights` undoes it.

    Args:
        model: The model.

    Returns:
        The number of layers.
    """
    layers = {module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module) and _fits(module)}
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not layers or needed * SPARE > available_bytes() or not _works():
        return 0
    replaced: dict[nn.Module, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                if child not in replaced:
                    replaced[child] = PackedLinear(child)
                setattr(parent, name, replaced[child])
    with torch.inference_mode():
        for layer in replaced.values():
            layer.packed()
    _log.debug("%d linear layers have weights in oneDNN's layout: %d MB", len(replaced), needed // 1_000_000)
    return len(replaced)


def unpack_weights(model: nn.Module) -> None:
    """Undo :func:`pack_weights`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, PackedLinear):
                setattr(parent, name, child.own)


def _unchanged(layer: nn.Linear) -> nn.Linear:
    return layer


def _fits(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and layer.weight.layout == torch.strided


@torch.inference_mode()
def _works() -> bool:
    """Whether this build of PyTorch has the product, and it gives the usual result."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    layer = nn.Linear(32, 16)
    x = torch.linspace(-1, 1, 96).view(3, 32)
    try:
        return torch.allclose(PackedLinear(layer)(x), layer(x), atol=1e-5)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
