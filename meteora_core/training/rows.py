"""Dataset rows as token sequences, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora_core.data.rows import Row
from meteora_core.errors import DataError
from meteora_core.routing import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainRow:
    """One sequence: prompt, response and the end-of-sequence token.

    Attributes:
        tokens: Token ids, with whatever the tokenizer puts at the start of a prompt (BOS, for most).
        gate_labels: One adapter index per token; -100 where no adapter is right or wrong.
        response_start: Position of the response's first token.
    """

    tokens: tuple[int, ...]
    gate_labels: tuple[int, ...]
    response_start: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Encoded:
    """The rows of one task, and how many were cut to the longest allowed length."""

    rows: list[TrainRow]
    cut: int


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, adapter: int, max_length: int) -> Encoded:
    """Tokenise rows as ``prompt + response + EOS``.

    Prompt and response are tokenised as one text, as they meet in generation. A row that is too long loses the start of its prompt
    (its BOS token stays); if even the response is too long, its end.

    Args:
        rows: Prompts and responses.
        tokenizer: The base model's.
        adapter: Gate label of every token of these rows.
        max_length: Longest sequence, in tokens.

    Raises:
        DataError: There are no rows.
    """
    if not rows:
        raise DataError("no training rows", hint="build the dataset again, without --max-train")
    encoded, cut = [], 0
    texts = tokenizer([row.prompt + row.response for row in rows], return_offsets_mapping=True, return_attention_mask=False)
    head = leading_special_tokens(tokenizer)
    for row, tokens, offsets in zip(rows, texts["input_ids"], texts["offset_mapping"], strict=True):
        ids = [token for token in tokens if token is not None]
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        start = next((position for position, (begin, end) in enumerate(offsets) if end > begin and begin >= len(row.prompt)), len(ids))
        ids.append(int(tokenizer.eos_token_id))
        excess = len(ids) - max_length
        if excess > 0:
            cut += 1
            drop = min(excess, max(0, start - head))
            ids = ids[:head] + ids[head + drop :]
            start -= drop
            ids = ids[:max_length]
        encoded.append(TrainRow(tuple(ids), (adapter,) * len(ids), min(start, len(ids))))
    return Encoded(encoded, cut)


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts before a text (1 for a BOS, 0 for none)."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for lead in range(len(with_special) - len(plain) + 1):
        if with_special[lead : lead + len(plain)] == plain:
            return lead
    return 0


@dataclass(frozen=True)
class Batch:
    """A right-padded batch.

    Attributes:
        input_ids, attention_mask: int64 (batch, tokens).
        targets: int64 (batch, tokens): position ``t`` holds the token at ``t + 1``; -100 at padding and at each row's last token.
        gate_labels: int64 (batch, tokens); -100 at padding.
        response: bool (batch, tokens): real tokens of the response (EOS included).
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    gate_labels: Tensor
    response: Tensor

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.attention_mask, self.targets, self.gate_labels, self.response


def collate(rows: Sequence[TrainRow], pad_token: int, multiple: int = 8, *, response_only: bool = False) -> Batch:
    """Pad rows on the right to one length, a multiple of ``multiple``; ``response_only`` leaves the prompt's tokens out of the targets."""
    longest = max(len(row) for row in rows)
    width = -(-longest // multiple) * multiple
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_token)
    mask = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    gates = torch.full(shape, IGNORE)
    response = torch.zeros(shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        length = len(row)
        tokens = torch.tensor(row.tokens)
        input_ids[place, :length] = tokens
        mask[place, :length] = 1
        first = max(0, row.response_start - 1) if response_only else 0
        targets[place, first : length - 1] = tokens[first + 1 :]
        gates[place, :length] = torch.tensor(row.gate_labels)
        response[place, row.response_start : length] = True
    return Batch(input_ids, mask, targets, gates, response)
