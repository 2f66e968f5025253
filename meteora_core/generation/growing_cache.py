"""What a model has read of a batch, in the model's own growing cache; rows that are done can leave."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.generation.rows import Batch, Rows, Rules
from meteora_core.model.caches import Reader, can_be_cut, new_cache

SHRINK = 0.75
"""Rows leave once at most this share of the batch goes on."""
AHEAD = 256
"""Most columns that are made for answers before they are needed."""


class GrowingCache:
    """Keys, values and states of a batch. Works for every model that decodes with a cache, on every device.

    Args:
        model: A causal language model in evaluation mode.
        options: More keyword arguments of its forward.
        rules: Rules of the rows.

    Attributes:
        length: Number of columns that were read.

    Raises:
        CheckpointError: The model has no cache.
    """

    captured = False
    """Whether steps are replayed as a CUDA graph: never."""

    def __init__(self, model: nn.Module, options: dict[str, Any], rules: Rules) -> None:
        self.model, self.rules = model, rules
        self.length = 0
        self._reader = Reader(model, **options)
        self._mask: Tensor | None = None

    @torch.inference_mode()
    def seat(self, batch: Batch) -> Rows:
        """The rows of a batch whose prompts were or will be read."""
        rows = Rows(len(batch.sampling), batch.width + min(max(batch.room), AHEAD), self.rules, batch.ids.device)
        rows.start(batch)
        return rows

    @torch.inference_mode()
    def read_batch(self, batch: Batch) -> Tensor:
        """Read the prompts of a batch into an empty cache. Returns the last position's logits (batch, vocabulary)."""
        self._mask, self.length = batch.mask, batch.width
        return self._reader.read(batch.ids, batch.mask, batch.positions())

    @torch.inference_mode()
    def read_piece(self, tokens: Sequence[int]) -> Tensor:
        """Read on in the text of a single row. Returns the last position's logits (1, vocabulary)."""
        logits = self._reader.read(torch.tensor([list(tokens)], device=next(self.model.parameters()).device))
        self.length += len(tokens)
        return logits

    @torch.inference_mode()
    def advance(self, rows: Rows, key: Hashable = None, *, eager: bool = False) -> None:
        """Read the last token of each row and choose the next. ``key`` and ``eager`` are for caches that replay CUDA graphs."""
        if self._mask is None:
            logits = self._reader.read(rows.token)
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], 1)
            logits = self._reader.read(rows.token, self._mask, rows.positions)
        self.length += 1
        rows.reserve(self.length + 1)
        rows.choose(logits)

    @torch.inference_mode()
    def leave(self, rows: Rows, going: Tensor, steps: int) -> tuple[GrowingCache, Rows] | None:
        """Let the rows that are done leave, if that pays and the cache can do it.

        Args:
            rows: All rows.
            going: int64 (kept,): indices of those that go on.
            steps: Most steps that are left.

        Returns:
            The cache and the rows that go on; None when all stay.
        """
        if len(going) > SHRINK * len(rows) or not self._reader.keep(going):
            return None
        if self._mask is not None:
            self._mask = self._mask[going]
        return self, rows.select(going)

    @torch.inference_mode()
    def cut(self, length: int) -> int:
        """Forget all tokens of a single row from ``length`` on.

        Returns:
            How many are left: ``length``, or 0 where the cache cannot be cut.
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
