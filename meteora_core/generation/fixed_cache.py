"""Keys and values of a batch in a cache of fixed size, so that a step can be the replay of a CUDA graph.

A small model's steps are bound by kernel launches, and those of hundreds of MeteoRA layers even more so. Where all rows are greedy, the graph holds the
whole step: the model, the choice of the tokens and the end of rows. Where tokens are drawn, it ends with the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.generation.capture import CapturedStep, capture
from meteora_core.generation.rows import Batch, Rows, Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAIL = 4
"""Once at most one row in this many goes on, they move to a cache that is smaller by this factor."""
TAIL_STEPS = 64
"""Rows only move if this many steps may be left: the smaller cache needs a graph of its own."""
CAPACITY = 256
"""Capacities for batches are multiples of this, so that batches of similar length share a graph."""
LEAST = 512
"""Capacity of the smallest cache for a single row; a larger one has twice as much, and so on."""


class FixedCache:
    """Keys and values of up to ``count`` rows of up to ``capacity`` tokens; on a CUDA GPU a step is a CUDA graph.

    A graph holds what the model was when it was captured: routing settings, adapters, the addresses of weights. Use another ``key`` after a change of
    settings, and make a new cache after any other change.

    Args:
        model: A causal language model in evaluation mode for which :func:`can_be_fixed` is true.
        options: More keyword arguments of its forward.
        rules: Rules of the rows.
        count: Number of rows.
        capacity: Number of columns; a cache for a single row grows beyond it when that is needed.
        longest: The model's context, which bounds the growth; None when it has none.

    Attributes:
        length: Number of columns that were read.
        rows: The rows of the cache; :meth:`seat` gives them to a batch.
        can_capture: Whether steps are captured: on a CUDA GPU, until a capture has failed.
    """

    def __init__(self, model: PreTrainedModel, options: dict[str, Any], rules: Rules, count: int, capacity: int, longest: int | None = None) -> None:
        self.model, self.options, self.rules, self.longest = model, options, rules, longest
        self.length = 0
        self.device = next(model.parameters()).device
        self.can_capture = self.device.type == "cuda"
        self._step: CapturedStep | None = None
        self._key: Hashable = None
        self._tail: FixedCache | None = None
        with torch.inference_mode():
            # One column more than the cache has: the last token is written, but never read.
            self.rows = Rows(count, capacity + 1, rules, self.device)
            self._make(capacity)

    def _make(self, capacity: int) -> None:
        from transformers import StaticCache

        self.capacity = capacity
        self._cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        self._mask = torch.zeros(len(self.rows), 1, 1, capacity, dtype=torch.bool, device=self.device)
        self._places = torch.arange(capacity, device=self.device)
        self._step = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._step is not None

    # --- reading prompts -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def seat(self, batch: Batch) -> Rows:
        """The rows of a batch whose prompts were or will be read."""
        self.rows.start(batch)
        return self.rows

    @torch.inference_mode()
    def read_batch(self, batch: Batch) -> Tensor:
        """Forget everything and read the prompts of a batch. Returns the last position's logits (count, vocabulary)."""
        spare = torch.arange(len(self.rows), device=self.device) % len(batch.sampling)
        mask = batch.mask[spare]
        self._cache.reset()
        self._mask.zero_()
        self._mask[:, 0, 0, : batch.width] = mask.bool()
        self.length = batch.width
        return self._forward(batch.ids[spare], mask, batch.positions()[spare])

    @torch.inference_mode()
    def read_piece(self, tokens: Sequence[int]) -> Tensor:
        """Read on in the text of a single row. Returns the last position's logits (1, vocabulary)."""
        end = self.length + len(tokens)
        if end > self.capacity:
            self._grow(end)
        places = torch.arange(self.length, end, device=self.device)
        mask = (self._places <= places.view(-1, 1)).view(1, 1, len(tokens), -1)
        logits = self._forward(torch.tensor([list(tokens)], device=self.device), mask, places.unsqueeze(0))
        self._go_to(end)
        return logits

    @torch.inference_mode()
    def cut(self, length: int) -> int:
        """Forget all tokens of a single row from ``length`` on, and what a pass that was broken off has left. Returns ``length``."""
        self._go_to(length)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)
        return length

    def _go_to(self, length: int) -> None:
        self.length = length
        self._mask.copy_(self._places < length)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True, **self.options)
        logits: Tensor = output.logits[:, -1]
        return logits

    # --- writing answers -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def advance(self, rows: Rows, key: Hashable = None, *, eager: bool = False) -> None:
        """Read the last token of each row and choose the next.

        Args:
            rows: :attr:`rows`.
            key: Everything that a graph depends on besides the weights (how adapters are chosen).
            eager: Run without a graph, because routes are recorded.
        """
        if self.length + 1 > self.capacity:
            self._grow(self.length + 1)
        step, whole = (self._whole_step, True) if not rows.draws else (self._read, False)
        captured = None if eager else self._captured(step, (key, whole))
        output = step() if captured is None else captured.replay()
        if not whole:
            rows.choose(output)
        self.length += 1

    def _read(self) -> Tensor:
        """Read the last tokens. Returns their logits (count, vocabulary)."""
        self._mask.index_fill_(3, self.rows.slot, True)
        return self._forward(self.rows.token, self._mask, self.rows.positions)

    def _whole_step(self) -> Tensor:
        """Read the last tokens and choose the next. Returns these, int64 (count, 1)."""
        self.rows.choose(self._read())
        return self.rows.token

    def _captured(self, step: Callable[[], Tensor], key: Hashable) -> CapturedStep | None:
        if not self.can_capture:
            return None
        if self._step is None or self._key != key:
            self._step = None
            self._step, self._key = capture(step, self._undo(), self.device), key
            self.can_capture = self._step is not None
        return self._step

    def _undo(self) -> Callable[[], None]:
        """A function that sets back what steps from now on change."""
        live = [self._mask, *self.rows.tensors(), *(layer.cumulative_length for layer in self._cache.layers)]
        saved = [tensor.clone() for tensor in live]

        def undo() -> None:
            for tensor, before in zip(live, saved, strict=True):
                tensor.copy_(before)

        return undo

    # --- other sizes -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def leave(self, rows: Rows, going: Tensor, steps: int) -> tuple[FixedCache, Rows] | None:
        """Let few rows go on in a smaller cache, if that pays.

        Args:
            rows: :attr:`rows`.
            going: int64 (kept,): indices of those that go on.
            steps: Most steps that are left.

        Returns:
            The smaller cache and its rows; None when all stay.
        """
        if len(going) * TAIL > len(rows) or len(rows) < 2 * TAIL or steps < TAIL_STEPS:
            return None
        if self._tail is None:
            self._tail = FixedCache(self.model, self.options, self.rules, len(rows) // TAIL, self.capacity)
        self._tail._take(self, going)
        return self._tail, self._tail.rows

    def _take(self, other: FixedCache, going: Tensor) -> None:
        """Become some rows of a cache of the same capacity."""
        spare = going[torch.arange(len(self.rows), device=going.device) % len(going)]
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            keys, values = theirs.keys[spare], theirs.values[spare]
            if not mine.is_initialized:
                mine.lazy_initialization(keys, values)
            mine.keys.copy_(keys)
            mine.values.copy_(values)
            mine.cumulative_length.copy_(theirs.cumulative_length)
        self._mask.copy_(other._mask[spare])
        self.length = other.length
        self.can_capture = self.can_capture and other.can_capture
        self.rows.take(other.rows, going)

    def _grow(self, needed: int) -> None:
        """Move a single row to a larger cache."""
        length, before = self.length, self._cache.layers
        self.rows.reserve(single_capacity(needed, self.longest) + 1)
        self._make(single_capacity(needed, self.longest))
        for mine, theirs in zip(self._cache.layers, before, strict=False):
            if not theirs.is_initialized:
                continue
            mine.lazy_initialization(theirs.keys, theirs.values)
            mine.keys[:, :, :length].copy_(theirs.keys[:, :, :length])
            mine.values[:, :, :length].copy_(theirs.values[:, :, :length])
        self.cut(length)


def single_capacity(needed: int, longest: int | None) -> int:
    """Capacity of a cache for one row of ``needed`` tokens; ``longest`` is the model's context or None."""
    capacity = max(LEAST, 1 << (needed - 1).bit_length())
    return capacity if longest is None else max(needed, min(capacity, longest))


def batch_shape(rows: int, tokens: int) -> tuple[int, int]:
    """Count and capacity of a cache for a batch of ``rows`` rows of ``tokens`` tokens: of few sizes, so that batches share a graph."""
    return 1 << (rows - 1).bit_length(), -(-tokens // CAPACITY) * CAPACITY


def can_be_fixed(model: PreTrainedModel) -> bool:
    """Whether :class:`FixedCache` can run the model: SDPA attention over a plain cache, no quantised weights, nothing observed."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if getattr(model.config, "_attn_implementation", None) != "sdpa" or getattr(model, "is_quantized", False) or is_observed(model):
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(model.config, "is_encoder_decoder", False):
        return False
    try:
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    except (AttributeError, TypeError, ValueError):
        return False
    return all(type(layer) is StaticLayer for layer in cache.layers)


def is_observed(model: PreTrainedModel) -> bool:
    """Whether routes are recorded, forced or labelled by eager code."""
    state = getattr(model, "meteora", None)
    return state is not None and bool(state.observed)
