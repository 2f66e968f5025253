"""Reads and writes, as whole tensors, parameters whose values are distributed over several processes (FSDP, tensor parallelism, DeepSpeed ZeRO)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed manages a parameter: it is sharded (stage 3), or its optimizer states are (stage 2)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_spread(parameter: Tensor) -> bool:
    """Whether a parameter must be gathered before it can be read, because FSDP, tensor parallelism or DeepSpeed manages it."""
    return hasattr(parameter, "full_tensor") or is_zero(parameter)


def is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed shards a parameter's values over the processes (stage 3), so that they are complete only during its module's forward call."""
    return hasattr(parameter, "ds_id")


def _whole_weight(parameter: Tensor) -> Tensor:
    """The whole parameter, in float32 if it is trainable. Every process must call this function."""
    if parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float()
    with _gathered(parameter):
        return parameter.detach().clone()


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Assign a whole tensor, the same in every process, to a trainable parameter and to its float32 copy."""
    from deepspeed.utils import safe_set_full_fp32_param

    value = value.to(parameter.device)
    with _gathered(parameter, writer=0), torch.no_grad():
        parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value.float())


def full_tensor(tensor: Tensor) -> Tensor:
    """A whole parameter or optimizer moment, on the CPU. If it is sharded, every process must call this function."""
    from torch.distributed.tensor import DTensor

    if is_zero(tensor):
        return _whole_weight(tensor).cpu().clone()
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, on the device of ``parameter`` and sharded like it. The dtype does not change."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Assign a whole tensor, the same in every process, to a parameter."""
    if is_zero(parameter):
        _set_weight(parameter, value)
        return
    with torch.no_grad():
        parameter.copy_(like(value, parameter))


def _gathered(parameter: Tensor, writer: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer, enabled=is_sharded(parameter))
