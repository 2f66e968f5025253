"""Support for the caches of different models: keys and values, states of convolutions and recurrences, or both.

transformers calls a model's cache ``past_key_values``, or ``cache_params`` if it consists of states only (Mamba). States have no token axis, so they
cannot be cut back to a shorter text. Whether they ignore padding, and whether a text may be read in parts, depends on the model; both properties are
tested once per model with a short text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from meteora_core.errors import CheckpointError
from meteora_core.reading import first_line

CacheArgument = Literal["past_key_values", "cache_params"]

_padding_safe: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_parts_safe: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

_MISFITS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)

_TEST_TOKENS = 3
"""Number of tokens of the test texts; it is smaller than the kernel size of the usual convolutions."""


def cache_argument(model: nn.Module) -> CacheArgument:
    """The name of the model's cache argument. Raises CheckpointError if the model does not accept a cache."""
    known = inspect.signature(model.forward).parameters
    if "past_key_values" in known:
        return "past_key_values"
    if "cache_params" in known:
        return "cache_params"
    raise _unusable(model, "they take no cache (past_key_values or cache_params)")


def new_cache(model: nn.Module) -> Any:
    """An empty cache, or None if the model creates its cache itself."""
    if cache_argument(model) == "cache_params":
        return None
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_of(model: nn.Module, output: Any) -> Any:
    """The cache in a model's output. Raises CheckpointError if the output has none."""
    cache = getattr(output, cache_argument(model), None)
    if cache is None:
        raise _unusable(model, f"their output holds no {cache_argument(model)}")
    return cache


def check_decoding(model: nn.Module) -> None:
    """Check that a model can decode with a cache. Raises CheckpointError if it cannot."""
    padding_is_safe(model)


def _unusable(model: nn.Module, reason: str) -> CheckpointError:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return CheckpointError(f"{kind} models cannot be used: {reason}", hint="choose a base model of another kind")


def has_states(model: nn.Module) -> bool:
    """Whether the model's cache holds states of convolutions or recurrences; also True if this cannot be determined."""
    if cache_argument(model) == "cache_params":
        return True
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin

    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return True
    return any(not isinstance(layer, CacheLayerMixin) or hasattr(layer, "conv_states") for layer in layers if type(layer).__name__ != "DummyLayer")


def can_be_cut(cache: Any) -> bool:
    """Whether a cache can be cut back to a shorter text; this is so if it holds keys and values only."""
    return hasattr(cache, "crop") and not any(hasattr(layer, "conv_states") for layer in getattr(cache, "layers", ()))


def keep_rows(cache: Any, rows: Tensor) -> bool:
    """Keep some rows of the batch in a cache and drop the others.

    Args:
        cache: Cache of a model, changed in place.
        rows: Indices of the rows to keep, int64 (rows,).

    Returns:
        Whether the cache supports this; if it does not, it is unchanged.
    """
    from transformers import Cache

    layers = getattr(cache, "layers", None)
    if layers and all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states") for layer in layers):
        cache.batch_select_indices(rows)
        return True
    if isinstance(cache, Cache) and hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)  # beam search selects rows with the same method
        return True
    return False


def _passes(test: Callable[[], bool]) -> bool:
    """The result of a test; False if the model does not support the test's calls. Raises torch.OutOfMemoryError."""
    try:
        return test()
    except torch.OutOfMemoryError:
        raise
    except _MISFITS:
        return False


@torch.inference_mode()
def padding_is_safe(model: nn.Module) -> bool:
    """Whether left padding leaves a row's logits unchanged, in the prefill and in the first decoding step.

    This is true for models with attention only. A model with states is tested once with a short text.

    Raises:
        CheckpointError: The model cannot decode with a cache.
    """
    if not has_states(model):
        return True
    if model not in _padding_safe:
        text = _text(model, _TEST_TOKENS)
        padded = torch.cat([text[:, :1].expand(1, _TEST_TOKENS), text], 1)
        mask = torch.ones_like(padded)
        mask[:, :_TEST_TOKENS] = 0
        try:
            alone = _first_and_next(model, text, torch.ones_like(text))
        except _MISFITS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _unusable(model, first_line(error)) from error
        _padding_safe[model] = _passes(lambda: _alike(alone, _first_and_next(model, padded, mask)))
    return _padding_safe[model]


@torch.inference_mode()
def pieces_are_safe(model: nn.Module) -> bool:
    """Whether a text gives the same logits when it is read in parts of several tokens as when it is read at once.

    This is true for models with attention only. A model with states is tested once with a short text.
    """
    if not has_states(model):
        return True
    if model not in _parts_safe:
        text, name = _text(model, 2 * _TEST_TOKENS), cache_argument(model)
        whole = model(input_ids=text, use_cache=True).logits[:, -1]
        cache = cache_of(model, model(input_ids=text[:, :_TEST_TOKENS], use_cache=True))
        _parts_safe[model] = _passes(lambda: _alike([whole], [model(input_ids=text[:, _TEST_TOKENS:], use_cache=True, **{name: cache}).logits[:, -1]]))
    return _parts_safe[model]


@torch.inference_mode()
def bypassed(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the modules that a model with states never calls.

    Such a model uses the weights of these modules directly (``dt_proj`` of Mamba), so adapters on them would have no effect.

    Args:
        model: A causal language model; models without states are not tested.
        modules: Modules by path. Leave out the experts of a mixture of experts, which may receive no tokens.
    """
    try:
        if not hasattr(model, "config") or not has_states(model):
            return []
    except CheckpointError:  # not a causal language model, so it cannot be tested
        return []
    called: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in modules.items()]
    try:
        model(input_ids=_text(model, _TEST_TOKENS), use_cache=True)
    except _MISFITS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in modules if path not in called]


def _text(model: nn.Module, length: int) -> Tensor:
    """Arbitrary token ids, int64 (1, length)."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return (torch.arange(length, device=next(model.parameters()).device) * 7 + rows // 3)[None] % rows


def _first_and_next(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    reader = Reader(model)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    first = reader.read(ids, mask, positions)
    mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
    return [first, reader.read(ids[:, -1:], mask, positions[:, -1:] + 1)]


def _alike(logits: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether logits are equal up to the rounding of their dtype."""
    for one, other in zip(logits, expected, strict=True):
        allowed = 1e-3 if one.dtype in (torch.float32, torch.float64) else 3e-2
        scale = other.float().abs().amax().clamp_min(1.0)
        if not bool((one.float() - other.float()).abs().amax() <= allowed * scale):
            return False
    return True


class Reader:
    """Reads a batch in parts, with the model's cache.

    Args:
        model: A causal language model in evaluation mode.
        options: Further keyword arguments of the model's ``forward``.

    Attributes:
        cache: The model's cache; None before the first call of :meth:`read` unless one is assigned.

    Raises:
        CheckpointError: The model does not accept a cache.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options = model, options
        self.name = cache_argument(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache: Any = None

    def read(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Read the next tokens.

        Args:
            ids: Token ids, int64 (batch, tokens).
            mask: Attention mask, int64 (batch, all tokens so far): 1 for tokens, 0 for padding. None if there is no padding.
            positions: Positions of the tokens, int64 (batch, tokens); None if the model counts them itself.

        Returns:
            The logits of the last position, in the model's dtype, (batch, vocabulary).
        """
        arguments: dict[str, Any] = {self.name: self.cache}
        if mask is not None and (self.name == "past_key_values" or self.cache is None):  # states already reflect the mask of earlier tokens
            arguments["attention_mask"] = mask
        if positions is not None and self.takes_positions:
            arguments["position_ids"] = positions
        output = self.model(input_ids=ids, use_cache=True, **arguments, **self.options)
        self.cache = cache_of(self.model, output)
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> bool:
        """Keep some rows of the batch, given by int64 indices (rows,). Returns False, and keeps all rows, if the cache does not support this."""
        return keep_rows(self.cache, rows)
