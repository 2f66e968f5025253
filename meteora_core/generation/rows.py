"""The rows of a batch: their prompts as tensors, and the state of their answers on the device."""

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
    """What holds for all answers of a batch.

    Attributes:
        ends: Tokens that end an answer; the first also fills rows that are done. May be empty.
        no_repeat: Size of the n-grams that may not repeat in prompt and answer; 0 allows all.
    """

    ends: tuple[int, ...]
    no_repeat: int = 0

    @property
    def filler(self) -> int:
        """Token that is given to rows that are done; their answers ignore it."""
        return self.ends[0] if self.ends else 0


@dataclass(frozen=True)
class Batch:
    """Prompts as tensors, padded at the left.

    Attributes:
        ids: int64 (batch, width), on the model's device.
        mask: int64 (batch, width): 1 for tokens, 0 for padding.
        sampling: Settings of each row; ``max_new_tokens`` is at least 1.
    """

    ids: Tensor
    mask: Tensor
    sampling: tuple[Sampling, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], pad: int, device: torch.device) -> Batch:
        """Pad prompts at the left.

        Args:
            prompts: Token ids of each row; no row is empty.
            sampling: Settings of each row.
            pad: Any token that the model has.
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
        """Length of the longest prompt."""
        return self.ids.shape[1]

    @property
    def room(self) -> list[int]:
        """Most new tokens of each row."""
        return [each.max_new_tokens for each in self.sampling]

    def positions(self) -> Tensor:
        """int64 (batch, width): position of each token in its row; 0 for padding."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def text(self, width: int) -> Tensor:
        """The prompts with :data:`NOTHING` for padding, int64 (batch, width)."""
        made = torch.full((self.ids.shape[0], width), NOTHING, device=self.ids.device)
        made[:, : self.width] = torch.where(self.mask.bool(), self.ids, NOTHING)
        return made


class Rows:
    """Rows that are being written, on the model's device.

    :meth:`choose` changes tensors in place and lets no value leave the device unless a token is drawn, so a CUDA graph can hold a greedy choice.

    Args:
        count: Number of rows; those beyond a batch's own count as done.
        width: Columns for prompts and answers.
        rules: Rules of the batch.
        device: Device of the model.

    Attributes:
        text: Prompts and answers, and which n-grams they hold.
        token: int64 (count, 1): the last token of each row, which the model has not read yet.
        positions: int64 (count, 1): its position in its row.
        slot: int64 (1,): its column.
        done: bool (count,): rows that are complete.
        usable: bool (count,): False once a row's logits were NaN or infinite.
        draws: Functions that draw tokens, by row; rows without one are greedy.
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
        """Columns for prompts and answers."""
        return self.text.text.shape[1]

    def start(self, batch: Batch) -> None:
        """Begin the answers of a batch, whose prompts the model has read; spare rows repeat those of the batch and are done."""
        count, device = len(batch.sampling), self.done.device
        spare = torch.arange(len(self), device=device) % count
        self.text.text.copy_(batch.text(self.width)[spare])
        self.text.restart(batch.width)
        self.slot.fill_(batch.width - 1)
        self.positions.copy_(batch.mask.sum(1, keepdim=True)[spare] - 1)
        self._last.copy_(torch.tensor(batch.room, device=device)[spare] + (batch.width - 1))
        self.done.copy_(torch.arange(len(self), device=device) >= count)
        self.usable.fill_(True)
        self.draws = {row: drawing(each, device) for row, each in enumerate(batch.sampling) if not each.greedy}

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> None:
        """Choose the next token of each row.

        Args:
            logits: Floating point (count, vocabulary): the model's output for the last tokens.
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
        self.positions.add_((~self.done).unsqueeze(1))  # a row that is done stays within the model's context

    def reserve(self, width: int) -> None:
        """Make room for at least ``width`` columns. New tensors take the place of old ones, so no CUDA graph may hold these rows."""
        if width > self.width:
            self.text.widen(max(width, 2 * self.width))

    def select(self, going: Tensor) -> Rows:
        """Some rows, by index, int64 (kept,), as rows of their own."""
        made = Rows(len(going), self.width, self.rules, self.done.device)
        made.take(self, going)
        return made

    def take(self, other: Rows, going: Tensor) -> None:
        """Become some rows of ``other``, which has the same width; spare rows repeat them and are done.

        Args:
            other: Rows that go on here.
            going: int64 (kept,): their indices.
        """
        spare = going[torch.arange(len(self), device=going.device) % len(going)]
        self.text.take(other.text, spare)
        self.slot.copy_(other.slot)
        for mine, theirs in ((self.token, other.token), (self.positions, other.positions), (self._last, other._last)):
            mine.copy_(theirs[spare])
        self.done.copy_(torch.arange(len(self), device=going.device) >= len(going))
        self.usable.fill_(True)
        self.draws = {place: other.draws[row] for place, row in enumerate(going.tolist()) if row in other.draws}

    def tensors(self) -> list[Tensor]:
        """Everything that :meth:`choose` writes to."""
        return [*self.text.tensors(), self.token, self.positions, self.slot, self.done, self.usable]

    def tokens_of(self, row: int) -> list[int]:
        """Prompt and answer so far of one row, without padding."""
        text = self.text.text[row]
        return [int(token) for token in text[text != NOTHING].tolist()]


def until_end(tokens: Sequence[int], room: int, ends: Collection[int]) -> list[int]:
    """The first ``room`` tokens, up to (without) the first that ends an answer."""
    cut = tokens[:room]
    return list(cut[: next((place for place, token in enumerate(cut) if token in ends), len(cut))])


def _is_end(token: Tensor, ends: Tensor) -> Tensor:
    """Which tokens (count,) are among ``ends``. By comparison and not by ``torch.isin``, which may sort: a CUDA graph cannot hold that."""
    return (token.unsqueeze(-1) == ends).any(-1)
