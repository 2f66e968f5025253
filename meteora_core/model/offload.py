"""Weights that accelerate keeps on the CPU or on disk and loads for each call of their module.

accelerate replaces such a weight with a tensor on the device "meta" and adds a hook to the module; the hook holds the values and the device on which
the module computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError


def compute_device(module: nn.Module, path: str) -> torch.device:
    """The device on which a module computes: the device of its weights, or the device to which accelerate's hook moves them.

    Args:
        module: A module with weights or buffers, such as a linear layer.
        path: Path of the module in the model, for error messages.

    Raises:
        UsageError: The weight is on the device "meta" and no hook of accelerate holds its values.
    """
    weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if weights and not weights[0].is_meta:
        return weights[0].device
    return torch.device(_hook(module, path).execution_device)


def real_tensor(module: nn.Module, name: str, path: str) -> Tensor:
    """A parameter of a module with its values, also if accelerate has moved them to the CPU or to disk.

    Args:
        module: The module that has the parameter.
        name: Name of the parameter in the module, such as ``"weight"``.
        path: Path of the module in the model, for error messages.

    Raises:
        UsageError: The parameter is on the device "meta" and no hook of accelerate holds its values.
    """
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    if not tensor.is_meta:
        return tensor
    try:
        stored = _hook(module, path).weights_map[name]
    except KeyError as missing:
        raise UsageError(f"accelerate offloaded {path}, but its files lack the weights", hint="load the base model again from unchanged files") from missing
    return stored if isinstance(stored, Tensor) else torch.as_tensor(stored)


def _hook(module: nn.Module, path: str) -> Any:
    """The hook with which accelerate offloads the module's weights."""
    attached = getattr(module, "_hf_hook", None)
    for hook in getattr(attached, "hooks", (attached,)):
        if getattr(hook, "weights_map", None) is not None:
            return hook
    raise UsageError(f'{path} is on the device "meta", so it has no weights', hint="load the weights of the base model before you attach adapters to it")
