"""Finds the module in which NaN or infinity first appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> tuple[str, nn.Module] | None:
    """Run a model and find the first module whose output is not finite.

    Modules are compared in the order in which they finish, so the innermost one is found.

    Args:
        model: Any module; hooks are registered on its modules during this call.
        run: A function that calls the model.

    Returns:
        The module's path and the module; None when all outputs are finite.
    """
    first: list[tuple[str, nn.Module]] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _arguments: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if not first and isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    first.append((path, module))

        return hook

    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return first[0] if first else None
