"""Which attention kernels the training stages may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable the cuDNN kernel of :func:`torch.nn.functional.scaled_dot_product_attention` in this block; the choice among its other kernels is unchanged.

    With an explicit mask, 16-bit tensors and a length of 64 modulo 128, cuDNN's backward pass on Hopper GPUs gives NaN for the gradient of every
    query whose log-sum-exp is below -88.7 (pytorch/pytorch issue 196678, seen with PyTorch 2.11 to 2.13). The forward pass is correct. Large biases on
    queries and keys, as in Qwen2, cause such values. PyTorch's flash, memory-efficient and math kernels are not affected.

    The setting applies to the whole process. Put the backward pass in the block too, because gradient checkpointing runs the forward pass again there.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
