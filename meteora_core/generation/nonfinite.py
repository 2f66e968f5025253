"""Detection of NaN and infinity in a model's logits, and the error that names the layer they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import NonFiniteError
from meteora_core.model.nonfinite import first_nonfinite_module
from meteora_core.tensors import is_quantized


def not_finite(logits: Tensor) -> Tensor:
    """Mark the rows of ``logits`` (..., vocabulary) that contain NaN or plus infinity, or only minus infinity; bool (...).

    A single entry of minus infinity is allowed, because it only rules out a token. The maximum of a row with NaN is NaN, so one reduction is enough.
    """
    return ~torch.isfinite(logits.amax(-1))


def non_finite_error(model: nn.Module, ids: Sequence[int], scope: Callable[[], AbstractContextManager[Any]] = nullcontext) -> NonFiniteError:
    """Build the error for a model whose logits after the tokens ``ids`` are not finite.

    The model reads the tokens once more, to find the first layer with such values.

    Args:
        model: A causal language model in evaluation mode.
        ids: Token ids up to the position whose logits are not finite.
        scope: Function that returns a context manager for this forward pass, such as one that forces routes or disables adapters.
    """
    device = next(model.parameters()).device

    def read() -> None:
        with scope(), torch.compiler.set_stance("force_eager"):
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)

    try:
        layer = first_nonfinite_module(model, read)
    except torch.OutOfMemoryError:
        layer = None
    return _error(model, layer)


def _error(model: nn.Module, layer: tuple[str, nn.Module] | None) -> NonFiniteError:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if layer is None:
        return NonFiniteError("the model's output is NaN or infinite", hint=f"compute in a wider dtype than {dtype}: METEORA_MODEL__DTYPE=float32")
    path, module = layer
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    broken = [name for name, tensor in tensors if not is_quantized(tensor) and not bool(torch.isfinite(tensor).all())]
    message = f"the model's output is NaN or infinite; the first layer where that happens is {path}"
    if broken:
        return NonFiniteError(f"{message}, whose {' and '.join(broken)} {'holds' if len(broken) == 1 else 'hold'} such values", hint=_AGAIN)
    if dtype in ("float16", "bfloat16"):
        return NonFiniteError(message, hint=f"its values are too large for {dtype}: compute in float32, for example with METEORA_MODEL__DTYPE=float32")
    return NonFiniteError(message, hint=f"the weights of this layer, or of one before it, are too large; {_AGAIN}")


_AGAIN = "train or download it again (a smaller learning rate keeps training finite)"
