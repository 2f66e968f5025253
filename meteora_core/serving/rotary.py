"""Rotary position embeddings by one kernel instead of ten, on a CUDA GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_kernels.plan import why_not_triton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "apply_rotary_pos_emb"
"""Name of the function that applies the embeddings in transformers' modelling files."""
Rotary = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def one_launch_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Replace the function in the model's modelling file during the block, if a kernel gives the same results on random input.

    Other models of this file are affected too, with the same results; tensors that the kernel does not take go to the function itself.
    """
    file = sys.modules.get(type(model).__module__)
    own = getattr(file, NAME, None)
    device = next(model.parameters()).device
    if file is None or own is None or why_not_triton(device.type, torch.float32) is not None or not _imitates(own, device):
        yield
        return
    setattr(file, NAME, _replaced(own))
    try:
        yield
    finally:
        setattr(file, NAME, own)


def _replaced(own: Rotary) -> Rotary:
    from meteora_kernels.attention.rotary import can_rotate, rotate

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling() or not q.is_cuda or not can_rotate(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    return apply


@torch.inference_mode()
def _imitates(own: Rotary, device: torch.device) -> bool:
    """Whether the kernel gives the function's results on random input."""
    from meteora_kernels.attention.rotary import rotate

    make = torch.Generator().manual_seed(0)
    query, key, angles = (torch.randn(*shape, generator=make).to(device) for shape in ((1, 4, 3, 32), (1, 2, 3, 32), (1, 3, 32)))
    try:
        expected, found = own(query, key, angles.cos(), angles.sin()), rotate(query, key, angles.cos(), angles.sin())
        return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    except Exception:  # a function with another signature, or a kernel that cannot be compiled here
        return False
