"""Checks for numbers that a model cannot compute with: NaN, infinity, and finite numbers large enough to overflow in use."""

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
"""The dtypes that weights may have, by their names in safetensors: those that PyTorch computes in on every device."""


def largest(dtype: torch.dtype) -> float:
    """The largest magnitude that a weight may have: three quarters of the dtype's exponents, so that a product with an activation stays finite.

    4,096 in float16, 2.5e28 in bfloat16 and float32. Weights of trained adapters stay below 100.
    """
    return float(torch.finfo(dtype).max) ** 0.75


def peak(tensor: Tensor) -> float:
    """The largest magnitude in a floating tensor; NaN where it holds one, 0 where it is empty. One pass, without a copy."""
    if not tensor.numel() or tensor.is_meta:
        return 0.0
    low, high = torch.aminmax(tensor.detach())  # several times as fast as isfinite or a norm; NaN comes out as NaN
    return max(-float(low), float(high))


def check_tensor(what: str, tensor: Tensor, *, dtype: torch.dtype | None = None, margin: bool = True, error: type[MeteoraError] = CheckpointError) -> None:
    """Refuse a tensor that holds a number which cannot be computed with.

    Args:
        what: The tensor's name in the error.
        tensor: Of a floating dtype.
        dtype: The dtype of the computation; None for the tensor's own.
        margin: Whether the limit is :func:`largest`; else it is the dtype's own largest number, as for tensors of a base model.
        error: The type of the error.

    Raises:
        MeteoraError: (of the type ``error``) It holds NaN or infinity, or a number above the limit.
    """
    refuse_peak(what, peak(tensor), dtype or tensor.dtype, error, margin=margin)


def refuse_peak(what: str, value: float, dtype: torch.dtype, error: type[MeteoraError], *, margin: bool = True) -> None:
    """Refuse the largest magnitude of something: NaN, infinity, or above the limit of :func:`check_tensor`."""
    if not math.isfinite(value):
        raise error(f"{what} holds {'NaN' if math.isnan(value) else 'an infinite number'}", hint="train or download it again")
    if value > (largest(dtype) if margin else torch.finfo(dtype).max):
        name = str(dtype).removeprefix("torch.")
        wider = "; choose --dtype bfloat16 or float32" if dtype is torch.float16 and value <= largest(torch.float32) else ""
        raise error(f"{what} holds {value:.3g}, whose use overflows in {name}", hint=f"train or download it again{wider}")


def check_stack(path: str, stack: Stack, names: Sequence[str], dtype: torch.dtype, error: type[MeteoraError] = AdapterError) -> None:
    """Refuse adapters of one layer whose use overflows in a dtype.

    Args:
        path: The layer.
        stack: Its adapters.
        names: The adapters' names, in order.
        dtype: That the model computes in.
        error: The type of the error.

    Raises:
        MeteoraError: (of the type ``error``) A, B, a scaling, or the scaled product of a row of A and a column of B is not finite or too large; the
            adapter and the tensor are named.
    """
    if stack.A.is_meta or not stack.A.shape[0]:
        return
    rows = [torch.maximum(-side.amin(dim=1), side.amax(dim=1)).double() for side in (stack.A, stack.B)]
    ranks = torch.tensor(stack.ranks)
    scaling = torch.repeat_interleave(stack.scaling.detach().cpu().double().abs(), ranks)
    products = (rows[0] * rows[1]).cpu() * scaling
    limit = largest(dtype)
    tables = (("lora_A", rows[0].cpu()), ("lora_B", rows[1].cpu()), ("the scaling", scaling), ("the product of scaling, lora_B and lora_A", products))
    if all(bool((values <= limit).all()) for _, values in tables):  # NaN is not below the limit
        return
    owners = torch.repeat_interleave(torch.arange(len(stack.ranks)), ranks)
    for what, values in tables:
        for row in (~(values <= limit)).nonzero().reshape(-1).tolist():
            refuse_peak(f"adapter {names[int(owners[row])]!r}: {what} of {path}", float(values[row]), dtype, error)
