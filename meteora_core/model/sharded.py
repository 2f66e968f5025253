"""Parameters whose values are spread over several processes (FSDP, tensor parallelism, DeepSpeed's ZeRO), read and written as whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_zero(parameter: Tensor) -> bool:
    """Whether a parameter belongs to DeepSpeed: sharded itself (stage 3), or trained with sharded states (stage 2)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_spread(parameter: Tensor) -> bool:
    """Whether a parameter has to be gathered to be read: FSDP, tensor parallelism or DeepSpeed hold it."""
    return hasattr(parameter, "full_tensor") or is_zero(parameter)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter's values are spread over the processes (stage 3), so that only a module's own forward sees them."""
    return hasattr(parameter, "ds_id")


def _whole_weight(parameter: Tensor) -> Tensor:
    """The parameter as a whole, float32 where it trains; every process must call this."""
    if parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(parameter)
        if found is not None:
            return found.detach().float()
    with _gathered(parameter):
        return parameter.detach().clone()


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter that trains another value (whole, the same in every process), and its float32 copy too."""
    from deepspeed.utils import safe_set_full_fp32_param

    value = value.to(parameter.device)
    with _gathered(parameter, writer=0), torch.no_grad():
        parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value.float())


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter or moment as a whole on the CPU; for a sharded one every process must call this."""
    from torch.distributed.tensor import DTensor

    if is_zero(tensor):
        return _whole_weight(tensor).cpu().clone()
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, placed and sharded as ``parameter`` is; its dtype is kept."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another value, a whole tensor that is the same in every process."""
    if is_zero(parameter):
        _set_weight(parameter, value)
        return
    with torch.no_grad():
        parameter.copy_(like(value, parameter))


def _gathered(parameter: Tensor, writer: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer, enabled=is_sharded(parameter))
