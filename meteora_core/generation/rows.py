"""The rows of a batch: their prompts as tensors, and the state of their answers on the model's device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_core.generation.no_repeat import NOTHING, NoRepeat
from meteora_core.generation.nonfinite import not_finite
from meteora_core.generation.sampling import Draw, Sampling, drawing


@dataclass(frozen=True)
class Rules:
    """Rules that hold for all answers of a batch.

    Attributes:
        ends: Ids of the tokens that end an answer; the first also fills finished rows. May be empty.
        no_repeat: Size of the n-grams that may not repeat in prompt and answer; 0 allows all.
    """

    ends: tuple[int, ...]
    no_repeat: int = 0

    @property
    def filler(self) -> int:
        """Id of the token that is written to finished rows, whose answers ignore it."""
        return self.ends[0] if self.ends else 0


@dataclass(frozen=True)
class Batch:
    """Prompts as tensors, padded on the left.

    Attributes:
        ids: Token ids, int64 (batch, width), on the model's device.
        mask: Attention mask, int64 (batch, width): 1 for tokens, 0 for padding.
        sampling: Sampling settings of each row; ``max_new_tokens`` is at least 1.
    """

    ids: Tensor
    mask: Tensor
    sampling: tuple[Sampling, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], pad: int, device: torch.device) -> Batch:
        """Pad prompts on the left.

        Args:
            prompts: Token ids of each row; no row is empty.
            sampling: Sampling settings of each row.
            pad: Id of any token in the model's vocabulary, used for padding.
            device: Device of the model.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        return cls(ids.to(device), mask.to(device), tuple(sampling))

    @property
    def width(self) -> int:
        """Number of tokens in the longest prompt."""
        return self.ids.shape[1]

    @property
    def room(self) -> list[int]:
        """Maximum number of new tokens of each row."""
        return [settings.max_new_tokens for settings in self.sampling]

    def positions(self) -> Tensor:
        """Position of each token in its row, 0 for padding; int64 (batch, width)."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def text(self, width: int) -> Tensor:
        """The prompts in a tensor with ``width`` columns, :data:`NOTHING` for padding and columns for answers; int64 (batch, width)."""
        text = torch.full((self.ids.shape[0], width), NOTHING, device=self.ids.device)
        text[:, : self.width] = torch.where(self.mask.bool(), self.ids, NOTHING)
        return text


class Rows:
    """Rows whose answers are being generated, as tensors on the model's device.

    :meth:`choose` changes tensors in place and copies no value to the host unless a token is drawn, so a greedy choice can be part of a CUDA graph.

    Args:
        count: Number of rows; rows in excess of a batch's size are spare and count as done.
        width: Number of columns for prompts and answers.
        rules: Rules for all answers.
        device: Device of the model.

    Attributes:
        text: Prompts and answers, with the record of their n-grams.
        token: The last token of each row, which the model has not read yet; int64 (count, 1).
        positions: Position of the last token in its row; int64 (count, 1).
        slot: Column of the last tokens; int64 (1,).
        done: Whether each row is finished; bool (count,).
        usable: Whether all logits of each row have been finite; bool (count,).
        draws: Functions that draw tokens, by row index; rows without one are greedy.
    """

    def __init__(self, count: int, width: int, rules: Rules, device: torch.device) -> None:
        self.rules = rules
        self.draws: dict[int, Draw] = {}
        self.text = NoRepeat(torch.full((count, width), NOTHING, device=device), 0, rules.no_repeat)
        self.token = torch.full((count, 1), rules.filler, device=device)
        self.positions = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.usable = torch.ones(count, dtype=torch.bool, device=device)
        self._last = torch.zeros(count, dtype=torch.int64, device=device)
        self._ends = torch.tensor(rules.ends, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.done)

    @property
    def width(self) -> int:
        """Number of columns for prompts and answers."""
        return self.text.text.shape[1]

    def start(self, batch: Batch) -> None:
        """Begin the answers of a batch. Spare rows repeat rows of the batch and are done from the start."""
        count, device = len(batch.sampling), self.done.device
        spare = torch.arange(len(self), device=device) % count
        self.text.text.copy_(batch.text(self.width)[spare])
        self.text.restart(batch.width)
        self.slot.fill_(batch.width - 1)
        self.positions.copy_(batch.mask.sum(1, keepdim=True)[spare] - 1)
        self._last.copy_(torch.tensor(batch.room, device=device)[spare] + (batch.width - 1))
        self.done.copy_(torch.arange(len(self), device=device) >= count)
        self.usable.fill_(True)
        self.draws = {row: drawing(settings, device) for row, settings in enumerate(batch.sampling) if not settings.greedy}

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> None:
        """Choose the next token of each row.

        Args:
            logits: Logits after the last token of each row, floating point (count, vocabulary).
        """
        logits = logits.float()
        self.usable.logical_and_(~not_finite(logits) | self.done)
        scores = self.text.ban(logits)
        token = scores.argmax(-1)
        if self.draws:
            drawn = torch.stack([self.usable, ~self.done]).all(0).tolist()
            for row, draw in self.draws.items():
                if drawn[row]:
                    token[row] = draw(scores[row])
        token = torch.where(self.done, self.rules.filler, token)
        self.slot.add_(1)
        self.text.add(token, self.slot)
        self.token.copy_(token.unsqueeze(1))
        self.done.logical_or_(_is_end(token, self._ends) | (self.slot >= self._last))
        self.positions.add_((~self.done).unsqueeze(1))  # positions of finished rows stay within the model's context

    def reserve(self, width: int) -> None:
        """Enlarge the rows to at least ``width`` columns. This replaces tensors, so no CUDA graph may have captured these rows."""
        if width > self.width:
            self.text.widen(max(width, 2 * self.width))

    def select(self, indices: Tensor) -> Rows:
        """Return a copy of the rows with the indices ``indices``, int64 (selected,)."""
        selected = Rows(len(indices), self.width, self.rules, self.done.device)
        selected.take(self, indices)
        return selected

    def take(self, other: Rows, indices: Tensor) -> None:
        """Copy some rows of ``other`` into these rows. Spare rows repeat the copied ones and are done.

        Args:
            other: Rows to copy from, of the same width.
            indices: Indices of the rows to copy, int64 (selected,).
        """
        spare = indices[torch.arange(len(self), device=indices.device) % len(indices)]
        self.text.take(other.text, spare)
        self.slot.copy_(other.slot)
        for mine, theirs in ((self.token, other.token), (self.positions, other.positions), (self._last, other._last)):
            mine.copy_(theirs[spare])
        self.done.copy_(torch.arange(len(self), device=indices.device) >= len(indices))
        self.usable.fill_(True)
        self.draws = {row: other.draws[index] for row, index in enumerate(indices.tolist()) if index in other.draws}

    def tensors(self) -> list[Tensor]:
        """The tensors that :meth:`choose` writes to."""
        return [*self.text.tensors(), self.token, self.positions, self.slot, self.done, self.usable]

    def tokens_of(self, row: int) -> list[int]:
        """Token ids of the prompt and the answer so far of one row, without padding."""
        text = self.text.text[row]
        return [int(token) for token in text[text != NOTHING].tolist()]


def until_end(tokens: Sequence[int], room: int, ends: Collection[int]) -> list[int]:
    """The first ``room`` tokens, or fewer if one of them is an end token; the end token is not included."""
    tokens = tokens[:room]
    return list(tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))])


def _is_end(token: Tensor, ends: Tensor) -> Tensor:
    """Whether each token is in ``ends``; bool (count,). ``torch.isin`` is not used because it may sort, which a CUDA graph cannot capture."""
    return (token.unsqueeze(-1) == ends).any(-1)
