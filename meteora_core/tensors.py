"""Whether a tensor's values can be read as numbers."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is quantised, so that its elements are not the numbers that it represents.

    These are integers (bitsandbytes, compressed-tensors), 8-bit floating-point numbers that have a scale elsewhere, and torchao's tensors, which hold
    integers and scales but have the dtype of the numbers that they represent. A tensor is not quantised merely because it is distributed over processes.

    Args:
        tensor: Any tensor.

    Example:
        >>> import torch
        >>> is_quantized(torch.zeros(2)), is_quantized(torch.zeros(2, dtype=torch.int8))
        (False, True)
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return True
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")
