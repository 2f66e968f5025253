"""NaN and infinity while decoding: where they come from, and the error that says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import NonFiniteError


def not_finite(logits: Tensor) -> Tensor:
    """Which rows of ``logits`` (..., vocabulary) hold NaN or plus infinity; bool (...).

    A vocabulary entry of minus infinity only rules a token out. One reduction finds the rest, because a maximum with NaN in it is NaN.
    """
    return ~torch.isfinite(logits.amax(-1))


@torch.inference_mode()
def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> tuple[str, nn.Module] | None:
    """Run a model and find the first module whose output is not finite.

    Modules are looked at in the order in which they finish, so the innermost one is found.

    Args:
        model: Any module; hooks are put on its modules for the length of this call.
        run: Calls the model.

    Returns:
        The module's path and the module; None when all outputs are finite.
    """
    found: list[tuple[str, nn.Module]] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _arguments: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    found.append((path, module))

        return hook

    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def non_finite_error(model: nn.Module, ids: Sequence[int], scope: Callable[[], AbstractContextManager[Any]] = nullcontext) -> NonFiniteError:
    """The error for a model whose logits are not finite after the tokens ``ids``; the tokens are read once more to find the layer.

    Args:
        model: A causal language model in evaluation mode.
        ids: The text that it had read.
        scope: A context manager that the reading runs in (forced routes, adapters off).
    """
    device = next(model.parameters()).device

    def read() -> None:
        with scope(), torch.compiler.set_stance("force_eager"):
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)

    try:
        found = first_nonfinite_module(model, read)
    except torch.OutOfMemoryError:
        found = None
    return _error(model, found)


def _error(model: nn.Module, found: tuple[str, nn.Module] | None) -> NonFiniteError:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if found is None:
        return NonFiniteError("the model's output is NaN or infinite", hint=f"compute in a wider dtype than {dtype}: METEORA_MODEL__DTYPE=float32")
    path, module = found
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    message = f"the model's output is NaN or infinite; the first layer where that happens is {path}"
    if broken:
        return NonFiniteError(f"{message}, whose {' and '.join(broken)} {'holds' if len(broken) == 1 else 'hold'} such values", hint=_AGAIN)
    if dtype in ("float16", "bfloat16"):
        return NonFiniteError(message, hint=f"its values are too large for {dtype}: compute in float32, for example with METEORA_MODEL__DTYPE=float32")
    return NonFiniteError(message, hint=f"the weights of this layer, or of one before it, are too large; {_AGAIN}")


_AGAIN = "train or download it again (a smaller learning rate keeps training finite)"
