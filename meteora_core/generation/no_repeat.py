"""A ban on repeated n-grams, equal to transformers' ``NoRepeatNGramLogitsProcessor``, in a few tensor operations per token.

That processor lists all n-grams of a text again for every token. This module instead keeps a run length for every position: the length of the longest
suffix of the whole text that also ends at this position. When a token is appended, the run length of a position that holds the same token becomes that of
the position before it plus one; all others become 0. A position whose run length is at least n - 1 is followed by a token that would repeat an n-gram. No
value is copied to the host, so the operations can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -1
"""Value in :attr:`NoRepeat.text` for padding and for columns that are not written yet."""


class NoRepeat:
    """The texts of a batch and the tokens that would repeat one of their n-grams.

    Args:
        text: Token ids, int64 (batch, width); :data:`NOTHING` for padding on the left and for columns not written yet.
        length: Number of columns already written.
        size: Size n of the n-grams; 0 bans nothing.

    Attributes:
        text: The given tensor, to which :meth:`add` writes in place.
    """

    def __init__(self, text: Tensor, length: int, size: int) -> None:
        self.text = text
        self.size = size
        self._runs = torch.zeros_like(text, dtype=torch.int32)
        self._spread = torch.arange(text.shape[1], device=text.device)
        self.restart(length)

    def restart(self, length: int) -> None:
        """Recompute the run lengths from the first ``length`` columns of :attr:`text` after it was changed from outside."""
        self._runs.zero_()
        if length == 0:
            return
        matching = self.text != NOTHING
        matching[:, length - 1 :] = False
        for back in range(min(self.size - 1, length)):
            last = self.text[:, length - 1 - back].unsqueeze(1)
            shifted = torch.full_like(self.text, NOTHING)
            shifted[:, back:] = self.text[:, : self.text.shape[1] - back]
            matching &= (shifted == last) & (last != NOTHING)
            self._runs += matching

    def add(self, tokens: Tensor, slot: Tensor) -> None:
        """Append one token to each text.

        Args:
            tokens: Token ids, int64 (batch,).
            slot: Index of the column to write, which is the first unwritten one; int64 (1,).
        """
        if self.size > 1:
            same = self.text == tokens.unsqueeze(1)
            before = torch.nn.functional.pad(self._runs[:, :-1], (1, 0))
            self._runs.copy_((before + 1) * same)
        self.text.index_copy_(1, slot, tokens.unsqueeze(1))

    def ban(self, scores: Tensor) -> Tensor:
        """Set the scores of tokens that would repeat an n-gram to minus infinity.

        Args:
            scores: Scores of the next token, floating point (batch, vocabulary).

        Returns:
            A new tensor of scores, or the same tensor if ``size`` is 0.
        """
        if not self.size:
            return scores
        hit = self.text != NOTHING
        if self.size > 1:
            hit[:, 1:] &= self._runs[:, :-1] >= self.size - 1
            hit[:, 0] = False
        tokens = torch.where(hit, self.text, self._spread % scores.shape[1])
        limits = torch.full_like(tokens, float("inf"), dtype=scores.dtype).masked_fill_(hit, -float("inf"))
        return scores.scatter_reduce(1, tokens, limits, "amin")

    def widen(self, width: int) -> None:
        """Add empty columns on the right, up to ``width``. This allocates new tensors."""
        more = width - self.text.shape[1]
        self.text = torch.nn.functional.pad(self.text, (0, more), value=NOTHING)
        self._runs = torch.nn.functional.pad(self._runs, (0, more))
        self._spread = torch.arange(width, device=self.text.device)

    def tensors(self) -> list[Tensor]:
        """The tensors that :meth:`add` writes to."""
        return [self.text, self._runs]

    def take(self, other: NoRepeat, rows: Tensor) -> None:
        """Copy the texts ``rows`` (int64 indices) of ``other`` into this batch, which must have as many texts and the same width."""
        self.text.copy_(other.text[rows])
        self._runs.copy_(other._runs[rows])
