"""No n-gram twice in one text: what transformers' ``NoRepeatNGramLogitsProcessor`` does, in a few tensor operations a token.

That processor lists every n-gram of every text anew for each token. Here, for every earlier place, the length of the text that ends there and is also the
end of the whole text is kept up to date: a new token makes it one longer where the same token stands, and 0 elsewhere. Places with n - 1 or more are
followed by a token that may not come next. No value leaves the device, so that the operations can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -1
"""In :attr:`NoRepeat.text`: padding, or not written yet."""


class NoRepeat:
    """The texts of a batch, and which tokens may not come next.

    Args:
        text: int64 (batch, width): token ids, :data:`NOTHING` at the left of shorter texts and wherever nothing stands yet.
        length: How many columns are written.
        size: n; 0 bans nothing.

    Attributes:
        text: As given, and what was added; changed in place.
    """

    def __init__(self, text: Tensor, length: int, size: int) -> None:
        self.text = text
        self.size = size
        self._runs = torch.zeros_like(text, dtype=torch.int32)
        self._spread = torch.arange(text.shape[1], device=text.device)
        self.restart(length)

    def restart(self, length: int) -> None:
        """Start from the first ``length`` columns of :attr:`text`, which was changed from outside."""
        self._runs.zero_()
        if length == 0:
            return
        going = self.text != NOTHING
        going[:, length - 1 :] = False
        for back in range(min(self.size - 1, length)):
            last = self.text[:, length - 1 - back].unsqueeze(1)
            shifted = torch.full_like(self.text, NOTHING)
            shifted[:, back:] = self.text[:, : self.text.shape[1] - back]
            going &= (shifted == last) & (last != NOTHING)
            self._runs += going

    def add(self, tokens: Tensor, slot: Tensor) -> None:
        """Write one token of each text.

        Args:
            tokens: int64 (batch,).
            slot: int64 (1,): the column to write, the one after the last.
        """
        if self.size > 1:
            same = self.text == tokens.unsqueeze(1)
            before = torch.nn.functional.pad(self._runs[:, :-1], (1, 0))
            self._runs.copy_((before + 1) * same)
        self.text.index_copy_(1, slot, tokens.unsqueeze(1))

    def ban(self, scores: Tensor) -> Tensor:
        """Put minus infinity where a token would repeat an n-gram.

        Args:
            scores: Floating point (batch, vocabulary).

        Returns:
            New scores; the same tensor when ``size`` is 0.
        """
        if not self.size:
            return scores
        hit = self.text != NOTHING
        if self.size > 1:
            hit[:, 1:] &= self._runs[:, :-1] >= self.size - 1
            hit[:, 0] = False
        places = torch.where(hit, self.text, self._spread % scores.shape[1])
        limits = torch.full_like(places, float("inf"), dtype=scores.dtype).masked_fill_(hit, -float("inf"))
        return scores.scatter_reduce(1, places, limits, "amin")

    def widen(self, width: int) -> None:
        """Add empty columns at the right, up to ``width``. The tensors are new ones."""
        more = width - self.text.shape[1]
        self.text = torch.nn.functional.pad(self.text, (0, more), value=NOTHING)
        self._runs = torch.nn.functional.pad(self._runs, (0, more))
        self._spread = torch.arange(width, device=self.text.device)

    def tensors(self) -> list[Tensor]:
        """Everything that :meth:`add` writes to."""
        return [self.text, self._runs]

    def take(self, other: NoRepeat, rows: Tensor) -> None:
        """Become some of another batch's texts, by index; the shapes must fit."""
        self.text.copy_(other.text[rows])
        self._runs.copy_(other._runs[rows])
