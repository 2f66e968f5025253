"""The position of a layer's tokens in the batch: a layer may get (batch, tokens, h), all tokens in one dimension, or only the last tokens of every row.

A hook on the model stores the shape of the batch of each call, from which a layer finds the row and position of each of its tokens. Only forced routes,
gate labels and recorders need them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.routing import Meteora

_INPUTS = ("input_ids", "inputs_embeds")


class RoutedLayer(Protocol):
    """The attributes of a layer that this module uses; :class:`meteora_core.model.layer.MeteoraLinear` has them.

    Attributes:
        path: The layer's name in the model.
        is_output: Whether the layer computes the model's logits.
        state: Routing state, which all layers of the model share.
    """

    path: str
    is_output: bool
    state: Meteora


class CallWatcher:
    """A forward pre-hook that stores the shape (batch, tokens) of a call in the routing state while layers are observed."""

    def __init__(self, state: Meteora) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.state.mode.observed:
            return
        given = [kwargs.get(name) for name in _INPUTS] + list(args[:1])
        inputs = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
        if inputs is not None:
            self.state.last_call.shape = inputs.shape[:2]
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            self.state.last_call.scattered = True


def watch_calls(model: nn.Module, state: Meteora) -> None:
    """Register hooks on the model and its decoder that store the shapes of their batches in ``state``."""
    for module in _callers(model):
        module.register_forward_pre_hook(CallWatcher(state), with_kwargs=True)


def stop_watching(model: nn.Module) -> None:
    """Undo :func:`watch_calls`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, CallWatcher)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _callers(model: nn.Module) -> list[nn.Module]:
    """The modules that are called with token ids or embeddings."""
    decoder = None
    with suppress(AttributeError, NotImplementedError):  # not every model has one
        decoder = model.get_decoder()  # type: ignore[operator]
    callers: list[nn.Module] = []
    for module in (model, getattr(model, "base_model", None), decoder):
        if isinstance(module, nn.Module) and not any(module is other for other in callers):
            callers.append(module)
    return callers


def is_head(model: nn.Module, path: str) -> bool:
    """Whether a layer is the model's output embedding (``lm_head``), which may be tied and is resized with the vocabulary."""
    with suppress(AttributeError, NotImplementedError):
        return model.get_output_embeddings() is model.get_submodule(path)  # type: ignore[operator]
    return False


def is_output_layer(model: nn.Module, path: str) -> bool:
    """Whether a layer comes after the decoder, so that it may be called with only the last tokens of every row."""
    decoder, prefix = getattr(model, "base_model", model), getattr(model, "base_model_prefix", "")
    return is_head(model, path) or (decoder is not model and not path.startswith(f"{prefix}."))


def is_routed_expert(path: str) -> bool:
    """Whether a layer belongs to an expert of a mixture of experts, which gets a part of the tokens, in another order."""
    return "experts" in path.split(".")


def check_observable(paths: Iterable[str], what: str) -> None:
    """Raise UsageError, before any work is done, if the tokens of a layer cannot be matched to the batch.

    Args:
        paths: Paths of the layers with adapters.
        what: Name of the feature that needs the tokens' positions, as the subject of the message.
    """
    for path in paths:
        if is_routed_expert(path):
            raise UsageError(
                f"{what} cannot tell which tokens {path} receives: it belongs to one of several experts, each of which gets only some of the tokens",
                hint="use adapters that do not target the experts (attention and shared experts can be targets)",
            )


def token_shape(layer: RoutedLayer, x: Tensor) -> torch.Size:
    """The shape (batch, tokens) of the tokens in a layer's input (..., in): all tokens of the batch, or the last tokens of every row.

    Raises:
        UsageError: The layer gets other tokens than those of the batch, or gets them in another order.
    """
    shape = x.shape[:-1]
    call = layer.state.last_call
    if call.shape is None:
        return shape
    if is_routed_expert(layer.path):
        check_observable([layer.path], "forcing, labelling or recording routes")
    if layer.is_output:
        if len(shape) == 2 and shape[0] == call.shape[0] and shape[1] <= call.shape[1] and not call.scattered:
            return shape
    elif shape == call.shape:
        return shape
    if shape.numel() == call.shape.numel() and (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
        return call.shape
    raise UsageError(
        f"{layer.path} receives an input of shape {tuple(x.shape)} in a batch of {call.shape[0]} x {call.shape[1]} tokens, "
        "so its tokens cannot be matched to the batch",
        hint="routes cannot be forced by row, labelled or recorded in this layer; use adapters that do not target it",
    )


def forced_routes(layer: RoutedLayer, forced: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights (..., 1) that send every token of ``x`` (..., in) to its forced adapter.

    Args:
        layer: The layer.
        forced: Index of the adapter for all tokens, for each row, or for each token: int64 (1,), (batch,) or (batch, tokens).
        x: Input of the layer.

    Raises:
        UsageError: The shape of ``forced`` does not match the batch.
    """
    shape = x.shape[:-1]
    if forced.numel() == 1:
        indices = forced.reshape(()).expand(shape)
    else:
        rows = token_shape(layer, x)
        if forced.ndim == 1 and forced.shape[0] == rows[0]:
            indices = forced.reshape(-1, *([1] * (len(rows) - 1))).expand(rows)
        elif forced.ndim == 2 and forced.shape[0] == rows[0] and len(rows) == 2 and forced.shape[1] >= rows[1] and (layer.is_output or forced.shape == rows):
            indices = forced[:, forced.shape[1] - rows[1] :]
        else:
            raise UsageError(
                f"routes are forced for a batch of shape {tuple(forced.shape)}, but {layer.path} receives a batch of shape {tuple(rows)}",
                hint="force one adapter, one for each row, or one for each token of the batch that the model is called with",
            )
    indices = indices.reshape(shape).unsqueeze(-1)
    return indices, torch.ones(indices.shape, device=x.device, dtype=torch.float32)
