"""Dataset rows as token sequences, and batches of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from meteora_core.data.rows import Row, check_texts
from meteora_core.errors import DataError
from meteora_core.routing import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHUNK = 1024
"""Number of texts that are tokenised in one call; the offsets of their tokens take more memory than the tokens."""


@dataclass(frozen=True)
class TrainRow:
    """One sequence: prompt, response and the end-of-sequence token.

    Attributes:
        tokens: Token ids, including the special tokens that the tokenizer puts before a prompt (usually BOS).
        gate_labels: One adapter index per token; -100 for tokens that belong to no adapter.
        response_start: Position of the response's first token.
        joined: The rows that this sequence consists of, one after another, if there are several; each of them sees those before it.
    """

    tokens: tuple[int, ...]
    gate_labels: tuple[int, ...]
    response_start: int
    joined: tuple[TrainRow, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def parts(self) -> tuple[TrainRow, ...]:
        """The rows in this sequence, each with one prompt and one response: those of :attr:`joined`, or the row itself."""
        return self.joined or (self,)


def join_rows(rows: Sequence[TrainRow]) -> TrainRow:
    """One sequence of several complete rows. A row's last token has no target, so that no prediction crosses rows.

    Args:
        rows: At least one row; none of them is joined itself.

    Example:
        >>> join_rows([TrainRow((1, 2), (0, 0), 1), TrainRow((3, 4), (1, 1), 1)]).gate_labels
        (0, 0, 1, 1)
    """
    tokens, labels = (tuple(chain.from_iterable(getattr(row, name) for row in rows)) for name in ("tokens", "gate_labels"))
    return TrainRow(tokens, labels, rows[0].response_start, tuple(rows))


class RowsOnDemand(Sequence[TrainRow]):
    """Rows that are made when they are accessed. Subclasses set :attr:`lengths` and implement :meth:`row`.

    Attributes:
        lengths: Number of tokens of every row.
    """

    lengths: list[int]

    @abstractmethod
    def row(self, index: int) -> TrainRow:
        """The row at an index from 0 to the number of rows minus 1."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> TrainRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainRow]: ...
    def __getitem__(self, index: int | slice) -> TrainRow | list[TrainRow]:
        found = range(len(self))[index]
        return self.row(found) if isinstance(found, int) else [self.row(each) for each in found]


@dataclass(frozen=True)
class Encoded:
    """The rows of one task, and the number of rows that were cut to the maximum length."""

    rows: Sequence[TrainRow]
    cut: int


@dataclass(frozen=True)
class Labelled:
    """A text to train on, with the adapter that each part of it belongs to.

    Attributes:
        prompt, response: The text is their concatenation.
        spans: ``(begin, end, adapter)`` in characters of the text, in order, without overlap; the text between spans belongs to no adapter.
    """

    prompt: str
    response: str
    spans: tuple[tuple[int, int, int], ...]


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, adapter: int, max_length: int, end: int | None = None) -> Encoded:
    """Tokenise rows as ``prompt + response + EOS``, every token labelled with ``adapter``; see :func:`encode_labelled`.

    Args:
        rows: Prompts and responses.
        tokenizer: The base model's tokenizer.
        adapter: Gate label of every token of these rows.
        max_length: Maximum length of a sequence in tokens.
        end: Token id that closes a response; None is the end-of-sequence token.

    Raises:
        DataError: There are no rows, or a row's text cannot be tokenised.
    """
    if not rows:
        raise DataError("no training rows", hint="build the dataset again, without --max-train")
    encoded, cut = [], 0
    head = leading_special_tokens(tokenizer)
    for _, start, ids, _ in tokenised([(row.prompt, row.response) for row in rows], tokenizer, end):
        encoded_row, was_cut = fit_row(ids, [adapter] * len(ids), start, head, max_length)
        encoded.append(encoded_row)
        cut += was_cut
    return Encoded(encoded, cut)


def encode_labelled(texts: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int, end: int | None = None) -> Encoded:
    """Tokenise texts whose parts belong to different adapters, as ``prompt + response + EOS``.

    Prompt and response are tokenised as one text, as in generation. A token has the label of the span that contains its first
    character, or -100 if there is none; the EOS token has the label of the last span. A row that is too long loses the start of its prompt, except for
    the BOS token; if the response alone is too long, the row loses the end of the response.

    Args:
        texts: Texts with their spans.
        tokenizer: The base model's tokenizer.
        max_length: Maximum length of a sequence in tokens.
        end: Token id that closes a response; None is the end-of-sequence token.
    """
    encoded, cut = [], 0
    head = leading_special_tokens(tokenizer)
    for index, start, ids, offsets in tokenised([(text.prompt, text.response) for text in texts], tokenizer, end):
        labels, spans, current = [], texts[index].spans, 0
        for begin, end in offsets:
            while current < len(spans) and spans[current][1] <= begin:
                current += 1
            inside = end > begin and current < len(spans) and spans[current][0] <= begin
            labels.append(spans[current][2] if inside else IGNORE)
        labels.append(spans[-1][2] if spans else IGNORE)
        row, was_cut = fit_row(ids, labels, start, head, max_length)
        encoded.append(row)
        cut += was_cut
    return Encoded(encoded, cut)


def tokenised(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, end: int | None = None
) -> Iterator[tuple[int, int, list[int], list[tuple[int, int]]]]:
    """Tokenise ``(prompt, response)`` pairs.

    Yields:
        Per text: its index, the position of the response's first token, the token ids closed by one EOS (or ``end``), and the tokens' character offsets
        (without the EOS).
    """
    eos = int(tokenizer.eos_token_id)
    for first in range(0, len(texts), CHUNK):
        part = [prompt + response for prompt, response in texts[first : first + CHUNK]]
        check_texts(part)
        encoding = tokenizer(part, return_offsets_mapping=True, return_attention_mask=False)
        for index, (tokens, offsets) in enumerate(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True), start=first):
            yield index, *_ended(list(tokens), offsets, len(texts[index][0]), eos, eos if end is None else end)


def _ended(ids: list[int], offsets: list[tuple[int, int]], begin: int, eos: int, end: int) -> tuple[int, list[int], list[tuple[int, int]]]:
    while ids and ids[-1] == eos:
        ids.pop()
    start = next((position for position, (first, last) in enumerate(offsets) if last > first and first >= begin), len(ids))
    ids.append(end)
    return min(start, len(ids) - 1), ids, offsets[: len(ids) - 1]


def fit_row(ids: list[int], labels: list[int], start: int, head: int, max_length: int) -> tuple[TrainRow, bool]:
    """A row of at most ``max_length`` tokens, and whether it was cut."""
    excess = len(ids) - max_length
    if excess > 0:
        drop = min(excess, max(0, start - head))
        ids, labels = (part[:head] + part[head + drop :] for part in (ids, labels))
        ids, labels, start = ids[:max_length], labels[:max_length], start - drop
    return TrainRow(tuple(ids), tuple(labels), min(start, len(ids))), excess > 0


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of special tokens that the tokenizer puts before a text (1 for a BOS token, 0 for none)."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for lead in range(len(with_special) - len(plain) + 1):
        if with_special[lead : lead + len(plain)] == plain:
            return lead
    return 0


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, or one of packed sequences.

    Attributes:
        input_ids, attention_mask: int64 (batch, tokens).
        targets: int64 (batch, tokens): position ``t`` holds the token at ``t + 1``; -100 at padding and at each row's last token.
        gate_labels: int64 (batch, tokens); -100 at padding.
        response: bool (batch, tokens): real tokens of the response (EOS included).
        position_ids: int64 (batch, tokens) for packed sequences: positions restart at 0 with each row and with the padding; otherwise None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    gate_labels: Tensor
    response: Tensor
    position_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        tensors = (self.input_ids, self.attention_mask, self.targets, self.gate_labels, self.response, self.position_ids)
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))  # type: ignore[arg-type]

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's call. Packed sequences have no attention mask: transformers derives a block-diagonal one from positions."""
        if self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


def collate(rows: Sequence[TrainRow], pad_token: int, multiple: int = 8, *, response_only: bool = False) -> Batch:
    """Pad rows on the right to one length, a multiple of ``multiple``; ``response_only`` leaves the prompt's tokens out of the targets."""
    return _lay_out([[row] for row in rows], pad_token, multiple, response_only)


def collate_packed(sequences: Sequence[Sequence[TrainRow]], pad_token: int, multiple: int = 8, *, response_only: bool = False) -> Batch:
    """Concatenate several rows in each sequence.

    Positions restart with every row; the model uses them to keep rows from attending to each other. A row's last token has no target, so that no
    prediction crosses rows, and every token keeps the gate label of its row.
    """
    batch = _lay_out(sequences, pad_token, multiple, response_only)
    positions = torch.zeros_like(batch.input_ids)
    for index, rows in enumerate(sequences):
        at = 0
        for length in (*map(len, rows), batch.input_ids.shape[1] - sum(map(len, rows))):
            positions[index, at : at + length] = torch.arange(length)
            at += length
    return replace(batch, position_ids=positions)


def _lay_out(sequences: Sequence[Sequence[TrainRow]], pad_token: int, multiple: int, response_only: bool) -> Batch:
    longest = max(sum(map(len, rows)) for rows in sequences)
    width = -(-longest // multiple) * multiple
    shape = (len(sequences), width)
    input_ids = torch.full(shape, pad_token)
    mask = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    gates = torch.full(shape, IGNORE)
    response = torch.zeros(shape, dtype=torch.bool)
    for index, rows in enumerate(sequences):
        at = 0
        for row in (part for each in rows for part in each.parts):
            length = len(row)
            tokens = torch.tensor(row.tokens)
            input_ids[index, at : at + length] = tokens
            mask[index, at : at + length] = 1
            first = first_target(row, response_only)
            targets[index, at + first : at + length - 1] = tokens[first + 1 :]
            gates[index, at : at + length] = torch.tensor(row.gate_labels)
            response[index, at + row.response_start : at + length] = True
            at += length
    return Batch(input_ids, mask, targets, gates, response)


def row_lengths(rows: Sequence[TrainRow]) -> list[int]:
    """The number of tokens of every row; rows on disk are not read for this."""
    known = getattr(rows, "lengths", None)
    return [len(row) for row in rows] if known is None else list(known)


def first_target(row: TrainRow, response_only: bool) -> int:
    """The first position of a row that has a target; the row is not joined."""
    return max(0, row.response_start - 1) if response_only else 0


def count_row_targets(row: TrainRow, response_only: bool = False) -> int:
    """The number of positions of a row that have a target."""
    return sum(max(0, len(part) - 1 - first_target(part, response_only)) for part in row.parts)


def row_target_labels(row: TrainRow, response_only: bool = False) -> tuple[int, ...]:
    """The gate label of each position of a row that has a target."""
    return tuple(chain.from_iterable(part.gate_labels[first_target(part, response_only) : len(part) - 1] for part in row.parts))


def count_row_labels(row: TrainRow) -> int:
    """The number of positions of a row that have a gate label."""
    return sum(label != IGNORE for label in row.gate_labels)


def count_row_answers(row: TrainRow) -> int:
    """The number of positions of a row's responses that have a gate label."""
    return sum(label != IGNORE for part in row.parts for label in part.gate_labels[part.response_start :])
