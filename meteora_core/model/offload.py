"""Weights that accelerate keeps on the CPU or on disk and loads for each call of their module.

accelerate leaves a tensor on the device "meta" in the place of such a weight, and a hook on the module that knows where the values are and on
which device the module computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError


def compute_device(module: nn.Module, path: str) -> torch.device:
    """The device on which a linear computes: that of its weights, or the one that accelerate's hook moves them to.

    Raises:
        UsageError: The weight is on the device "meta" and nothing knows its values.
    """
    weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if weights and not weights[0].is_meta:
        return weights[0].device
    return torch.device(_hook(module, path).execution_device)


def real_tensor(module: nn.Module, name: str, path: str) -> Tensor:
    """A parameter of a module with its values, wherever accelerate keeps them.

    Raises:
        UsageError: The parameter is on the device "meta" and nothing knows its values.
    """
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    if not tensor.is_meta:
        return tensor
    try:
        stored = _hook(module, path).weights_map[name]
    except KeyError as missing:
        raise UsageError(
            f"accelerate offloaded {path}, but its files lack the weights", hint="load the base model again, from files that did not change"
        ) from missing
    return stored if isinstance(stored, Tensor) else torch.as_tensor(stored)


def _hook(module: nn.Module, path: str) -> Any:
    """accelerate's hook that offloads the module's own weights."""
    found = getattr(module, "_hf_hook", None)
    for hook in getattr(found, "hooks", (found,)):
        if getattr(hook, "weights_map", None) is not None:
            return hook
    raise UsageError(f'{path} is on the device "meta", so it has no weights', hint="load the weights of the base model before you attach adapters to it")
