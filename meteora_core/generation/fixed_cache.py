"""Decoding with a cache of fixed size, so that steps can be replayed as a CUDA graph.

Kernel launches dominate the time of a small model's step, the more so with hundreds of MeteoRA layers. If all rows are greedy, the graph holds the whole
step: the model, the choice of tokens and the check for finished rows. If tokens are drawn, it ends with the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.generation.capture import CapturedStep, capture
from meteora_core.generation.piece_graphs import PieceGraphs
from meteora_core.generation.rows import Batch, Rows, Rules
from meteora_core.routing import find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAIL = 4
"""Once at most 1/TAIL of the rows are unfinished, they move to a cache that has fewer rows by this factor."""
TAIL_STEPS = 64
"""Minimum number of remaining steps for such a move, which costs the capture of another graph."""
CAPACITY = 256
"""Capacities for batches are multiples of this, so that batches of similar length share a graph."""
CAPTURABLE = ("torchao", "compressed-tensors")
"""Names of the libraries whose products with quantised weights can be captured in CUDA graphs, as transformers spells them."""
LEAST = 512
"""Capacity of the smallest cache for a single row. Larger ones have capacities that are powers of two."""


class FixedCache:
    """Keys and values of up to ``count`` rows with up to ``capacity`` tokens each. On a CUDA GPU, steps are replayed as a CUDA graph.

    A graph keeps the routing settings, the adapters and the addresses of the weights at the time of its capture. Pass another ``key`` after the settings
    have changed, and make a new cache after any other change.

    Args:
        model: A causal language model in evaluation mode for which :func:`can_be_fixed` is true.
        options: Further keyword arguments of the model's forward method.
        rules: Rules for all answers.
        count: Number of rows.
        capacity: Number of columns. A cache for a single row is enlarged when it needs more.
        longest: The model's context in tokens, up to which the cache may be enlarged; None for no limit.

    Attributes:
        length: Number of columns that the model has read.
        rows: The rows of the cache, which :meth:`seat` assigns to a batch.
        can_capture: Whether steps are captured: true on a CUDA GPU, until a capture fails.
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
            # The rows have one more column than the cache, because the model never reads an answer's last token.
            self.rows = Rows(count, capacity + 1, rules, self.device)
            self._make(capacity)

    def _make(self, capacity: int) -> None:
        from transformers import StaticCache

        self.capacity = capacity
        self._cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        self._mask = torch.zeros(len(self.rows), 1, 1, capacity, dtype=torch.bool, device=self.device)
        self._columns = torch.arange(capacity, device=self.device)
        self._step = None
        self._pieces = PieceGraphs(self._columns)  # holds no reference to this cache, whose memory is freed with the last reference

    @property
    def captured(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._step is not None

    # --- reading prompts -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def seat(self, batch: Batch) -> Rows:
        """Assign the rows to a batch and return them. The prompts may be read before or after this call."""
        self.rows.start(batch)
        return self.rows

    @torch.inference_mode()
    def read_batch(self, batch: Batch) -> Tensor:
        """Clear the cache and read the prompts of a batch. Returns the logits of the last position, (count, vocabulary)."""
        spare = torch.arange(len(self.rows), device=self.device) % len(batch.sampling)
        mask = batch.mask[spare]
        self._cache.reset()
        self._mask.zero_()
        self._mask[:, 0, 0, : batch.width] = mask.bool()
        self.length = batch.width
        return self._forward(batch.ids[spare], mask, batch.positions()[spare])

    @torch.inference_mode()
    def read_piece(self, tokens: Sequence[int], key: Hashable = None, *, eager: bool = False) -> Tensor:
        """Read further tokens of a single row, on a CUDA GPU by a graph of :class:`~meteora_core.generation.piece_graphs.PieceGraphs`.

        Args:
            tokens: The tokens to read.
            key: Everything besides the weights that a graph depends on, such as the choice of adapters.
            eager: Whether to run without a graph, because routes are recorded.

        Returns:
            The logits of the last position, (1, vocabulary).
        """
        end = self.length + len(tokens)
        if end > self.capacity:
            self._grow(end)
        if self.can_capture and not (eager or is_observed(self.model)) and (captured := self._pieces.read(self, tokens, key)) is not None:
            return captured
        positions = torch.arange(self.length, end, device=self.device)
        mask = (self._columns <= positions.view(-1, 1)).view(1, 1, len(tokens), -1)
        logits = self._forward(torch.tensor([list(tokens)], device=self.device), mask, positions.unsqueeze(0))
        self._set_length(end)
        return logits

    @torch.inference_mode()
    def cut(self, length: int) -> int:
        """Forget all tokens of a single row from position ``length`` on, including those of an interrupted pass. Returns ``length``."""
        self._set_length(length)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)
        return length

    def _set_length(self, length: int) -> None:
        self.length = length
        self._mask.copy_(self._columns < length)

    def read_padded(self, ids: Tensor, mask: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Read tokens with padding on the right. Returns the logits of the token with the index ``last``, int64 (1,); (1, vocabulary)."""
        options = dict.fromkeys(self.options, last)  # the only option is the position whose logits are needed
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True, **options)
        logits: Tensor = output.logits
        return logits[:, 0] if options else logits[:, last][:, 0]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True, **self.options)
        logits: Tensor = output.logits[:, -1]
        return logits

    # --- writing answers -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def advance(self, rows: Rows, key: Hashable = None, *, eager: bool = False) -> None:
        """Read the last token of each row and choose the next.

        Args:
            rows: The rows of this cache, :attr:`rows`.
            key: Everything besides the weights that a graph depends on, such as the choice of adapters.
            eager: Whether to run without a graph, because routes are recorded.
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
        """Read the last token of each row. Returns the logits after it, (count, vocabulary)."""
        self._mask.index_fill_(3, self.rows.slot, True)
        return self._forward(self.rows.token, self._mask, self.rows.positions)

    def _whole_step(self) -> Tensor:
        """Read the last token of each row and choose the next. Returns the chosen tokens, int64 (count, 1)."""
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
        """Return a function that restores the present state after further steps."""
        changing = [self._mask, *self.rows.tensors(), *(layer.cumulative_length for layer in self._cache.layers)]
        saved = [tensor.clone() for tensor in changing]

        def undo() -> None:
            for tensor, before in zip(changing, saved, strict=True):
                tensor.copy_(before)

        return undo

    # --- other sizes -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def leave(self, rows: Rows, unfinished: Tensor, steps: int) -> tuple[FixedCache, Rows] | None:
        """Move the unfinished rows to a smaller cache if that saves time.

        Args:
            rows: The rows of this cache, :attr:`rows`.
            unfinished: Indices of the unfinished rows, int64 (unfinished,).
            steps: Maximum number of remaining steps.

        Returns:
            The smaller cache and its rows, or None if all rows stay.
        """
        if len(unfinished) * TAIL > len(rows) or len(rows) < 2 * TAIL or steps < TAIL_STEPS:
            return None
        if self._tail is None:
            self._tail = FixedCache(self.model, self.options, self.rules, len(rows) // TAIL, self.capacity)
        self._tail._take(self, unfinished)
        return self._tail, self._tail.rows

    def _take(self, other: FixedCache, unfinished: Tensor) -> None:
        """Copy the unfinished rows of another cache of the same capacity into this one."""
        spare = unfinished[torch.arange(len(self.rows), device=unfinished.device) % len(unfinished)]
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
        self.rows.take(other.rows, unfinished)

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
    """Number of columns of a cache for one row of ``needed`` tokens; ``longest`` is the model's context in tokens, or None."""
    capacity = max(LEAST, 1 << (needed - 1).bit_length())
    return capacity if longest is None else max(needed, min(capacity, longest))


def batch_shape(rows: int, tokens: int) -> tuple[int, int]:
    """Count and capacity of a cache for ``rows`` rows of ``tokens`` tokens, both rounded up so that batches of similar size share a graph."""
    return 1 << (rows - 1).bit_length(), -(-tokens // CAPACITY) * CAPACITY


def can_be_fixed(model: PreTrainedModel) -> bool:
    """Whether :class:`FixedCache` supports the model: it uses SDPA attention over a plain cache, and its routes are not observed.

    Of the libraries that quantise weights, only those of :data:`CAPTURABLE` are supported; products of others may wait for the host.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if getattr(model.config, "_attn_implementation", None) != "sdpa" or is_observed(model):
        return False
    if getattr(model, "is_quantized", False) and getattr(getattr(model.config, "quantization_config", None), "quant_method", None) not in CAPTURABLE:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(model.config, "is_encoder_decoder", False):
        return False
    try:
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    except (AttributeError, TypeError, ValueError):
        return False
    return all(type(layer) is StaticLayer for layer in cache.layers)


def is_observed(model: PreTrainedModel) -> bool:
    """Whether the model's routes are recorded, forced or labelled, which eager code does."""
    state = find_meteora(model)
    return state is not None and bool(state.observed)
