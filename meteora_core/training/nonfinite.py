"""Where a NaN or an infinity comes from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meteora_core.training.rows import Batch


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, batch: Batch) -> str:
    """Run a batch again and return the path of the first module whose output is not finite, or "" when every output is.

    Modules are compared in the order in which they finish, so the innermost one is named.
    """
    found: list[str] = []

    def watch(path: str) -> object:
        def hook(_module: nn.Module, _arguments: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            for tensor in tensors:
                if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    found.append(path)

        return hook

    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        model(**batch.model_inputs(), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""
