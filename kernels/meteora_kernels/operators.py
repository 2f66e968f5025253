"""Registration of operators with PyTorch's dispatcher, without the per-call checks of ``torch.library.custom_op`` (0.2 ms a call on a slow CPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def eager(tensor: torch.Tensor) -> bool:
    """Whether an operator's function may be called itself: nothing traces, so the dispatcher would only add its own time (10 to 40 us of a CPU)."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Around kernel launches: Triton launches on the current GPU, which need not be the one that holds the tensors."""
    if not tensor.is_cuda or torch.compiler.is_compiling() or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator ``torch.ops.meteora.<name>``.

    The function must return new tensors only (none of its inputs, no views of them, none twice).

    Args:
        name: Of the operator.
        mutates: Names of arguments that it writes to.

    Returns:
        A decorator that gives back the callable operator; where :func:`eager` holds, the function itself does the same.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        torch.library.define(f"meteora::{name}", schema)
        torch.library.impl(f"meteora::{name}", "default", function)
        return getattr(torch.ops.meteora, name).default

    return register
