"""Checks for numbers that a model cannot compute with: NaN, infinity, and finite numbers so large that products overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora_core.errors import AdapterError, CheckpointError, MeteoraError

if TYPE_CHECKING:
    from meteora_core.adapters.stack import Stack

WEIGHT_NAMES = frozenset({"F16", "BF16", "F32", "F64"})
"""The allowed dtypes of weights, by their names in safetensors: those in which PyTorch computes on every device."""


def largest(dtype: torch.dtype) -> float:
    """Return the largest allowed magnitude of a weight: the dtype's maximum to the power 3/4, so that its product with an activation stays finite.

    This is 4,096 in float16, and 2.5e28 in bfloat16 and float32. Weights of trained adapters stay below 100.
    """
    return float(torch.finfo(dtype).max) ** 0.75


def peak(tensor: Tensor) -> float:
    """Return the largest magnitude in a floating-point tensor: NaN if it contains NaN, 0 if it is empty. Takes one pass and no copy."""
    if not tensor.numel() or tensor.is_meta:
        return 0.0
    low, high = torch.aminmax(tensor.detach())  # several times as fast as isfinite or a norm; propagates NaN
    return max(-float(low), float(high))


def check_tensor(what: str, tensor: Tensor, *, dtype: torch.dtype | None = None, margin: bool = True, error: type[MeteoraError] = CheckpointError) -> None:
    """Refuse a tensor with numbers that a model cannot compute with.

    Args:
        what: The name of the tensor in the error message.
        tensor: A tensor of a floating-point dtype.
        dtype: The dtype of the computation; None means the dtype of the tensor.
        margin: Whether the limit is :func:`largest`. If False, it is the largest number of the dtype, as for tensors of a base model.
        error: The type of the error to raise.

    Raises:
        MeteoraError: (of the type ``error``) The tensor contains NaN, infinity, or a number above the limit.
    """
    refuse_peak(what, peak(tensor), dtype or tensor.dtype, error, margin=margin)


def refuse_peak(what: str, value: float, dtype: torch.dtype, error: type[MeteoraError], *, margin: bool = True) -> None:
    """Refuse a largest magnitude that is NaN, infinite, or above the limit of :func:`check_tensor`, whose arguments this takes."""
    if not math.isfinite(value):
        raise error(f"{what} holds {'NaN' if math.isnan(value) else 'an infinite number'}", hint="train or download it again")
    if value > (largest(dtype) if margin else torch.finfo(dtype).max):
        name = str(dtype).removeprefix("torch.")
        wider = "; choose --dtype bfloat16 or float32" if dtype is torch.float16 and value <= largest(torch.float32) else ""
        raise error(f"{what} holds {value:.3g}, whose use overflows in {name}", hint=f"train or download it again{wider}")


def check_stack(path: str, stack: Stack, names: Sequence[str], dtype: torch.dtype, error: type[MeteoraError] = AdapterError) -> None:
    """Refuse adapters of one layer that overflow in a dtype.

    Args:
        path: The module path of the layer.
        stack: The adapters of the layer.
        names: The names of the adapters, in order.
        dtype: The dtype in which the model computes.
        error: The type of the error to raise.

    Raises:
        MeteoraError: (of the type ``error``) A, B, a scaling, or the scaled product of a row of A and a column of B is not finite or too large; the
            message names the adapter and the tensor.
    """
    if stack.A.is_meta or not stack.A.shape[0]:
        return
    peaks = [torch.maximum(-side.amin(dim=1), side.amax(dim=1)).double() for side in (stack.A, stack.B)]
    ranks = torch.tensor(stack.ranks)
    scaling = torch.repeat_interleave(stack.scaling.detach().cpu().double().abs(), ranks)
    products = (peaks[0] * peaks[1]).cpu() * scaling
    limit = largest(dtype)
    tables = (("lora_A", peaks[0].cpu()), ("lora_B", peaks[1].cpu()), ("the scaling", scaling), ("the product of scaling, lora_B and lora_A", products))
    if all(bool((values <= limit).all()) for _, values in tables):  # False for NaN
        return
    owners = torch.repeat_interleave(torch.arange(len(stack.ranks)), ranks)
    for what, values in tables:
        for row in (~(values <= limit)).nonzero().reshape(-1).tolist():
            refuse_peak(f"adapter {names[int(owners[row])]!r}: {what} of {path}", float(values[row]), dtype, error)
