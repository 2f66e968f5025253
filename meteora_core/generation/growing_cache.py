"""Decoding with the model's own cache, which grows with every token and can drop finished rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.generation.rows import Batch, Rows, Rules
from meteora_core.model.caches import Reader, can_be_cut, new_cache

SHRINK = 0.75
"""Finished rows are dropped once at most this share of the batch is unfinished."""
AHEAD = 256
"""Maximum number of columns allocated for answers in advance."""


class GrowingCache:
    """Keys, values and recurrent states of a batch. Works on every device, for every model that decodes with a cache.

    Args:
        model: A causal language model in evaluation mode.
        options: Further keyword arguments of the model's forward method.
        rules: Rules for all answers.

    Attributes:
        length: Number of columns that the model has read.

    Raises:
        CheckpointError: The model has no cache.
    """

    captured = False
    """Whether steps are replayed as a CUDA graph. Always false for this cache."""

    def __init__(self, model: nn.Module, options: dict[str, Any], rules: Rules) -> None:
        self.model, self.rules = model, rules
        self.length = 0
        self._reader = Reader(model, **options)
        self._mask: Tensor | None = None

    @torch.inference_mode()
    def seat(self, batch: Batch) -> Rows:
        """Return the rows of a batch. Its prompts may be read before or after this call."""
        rows = Rows(len(batch.sampling), batch.width + min(max(batch.room), AHEAD), self.rules, batch.ids.device)
        rows.start(batch)
        return rows

    @torch.inference_mode()
    def read_batch(self, batch: Batch) -> Tensor:
        """Read the prompts of a batch into the empty cache. Returns the logits of the last position, (batch, vocabulary)."""
        self._mask, self.length = batch.mask, batch.width
        return self._reader.read(batch.ids, batch.mask, batch.positions())

    @torch.inference_mode()
    def read_piece(self, tokens: Sequence[int], key: Hashable = None, *, eager: bool = False) -> Tensor:
        """Read further tokens of a single row. Returns the logits of the last position, (1, vocabulary).

        ``key`` and ``eager`` matter only for :class:`FixedCache`.
        """
        logits = self._reader.read(torch.tensor([list(tokens)], device=next(self.model.parameters()).device))
        self.length += len(tokens)
        return logits

    @torch.inference_mode()
    def advance(self, rows: Rows, key: Hashable = None, *, eager: bool = False) -> None:
        """Read the last token of each row and choose the next. ``key`` and ``eager`` matter only for :class:`FixedCache`."""
        if self._mask is None:
            logits = self._reader.read(rows.token)
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], 1)
            logits = self._reader.read(rows.token, self._mask, rows.positions)
        self.length += 1
        rows.reserve(self.length + 1)
        rows.choose(logits)

    @torch.inference_mode()
    def leave(self, rows: Rows, unfinished: Tensor, steps: int) -> tuple[GrowingCache, Rows] | None:
        """Drop the finished rows if that saves time and the cache supports it.

        Args:
            rows: All rows of the cache.
            unfinished: Indices of the unfinished rows, int64 (unfinished,).
            steps: Maximum number of remaining steps; ignored by this cache.

        Returns:
            The cache and the unfinished rows, or None if all rows stay.
        """
        if len(unfinished) > SHRINK * len(rows) or not self._reader.keep(unfinished):
            return None
        if self._mask is not None:
            self._mask = self._mask[unfinished]
        return self, rows.select(unfinished)

    @torch.inference_mode()
    def cut(self, length: int) -> int:
        """Forget all tokens of a single row from position ``length`` on.

        Returns:
            The number of tokens left: ``length``, or 0 if the cache cannot be cut.
        """
        excess = self.length - length
        if length and excess:
            try:
                if can_be_cut(self._reader.cache):
                    self._reader.cache.crop(-excess)
                else:
                    length = 0
            except (RuntimeError, ValueError):
                length = 0
        if not length:
            self._reader.cache, self._mask = new_cache(self.model), None
        self.length = length
        return length
