"""Prompts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora_core.data.rows import check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dataset.

    Attributes:
        index: Row of the dataset.
        tokens: Token ids, as the tokenizer starts a text (with its BOS, if it has one).
    """

    index: int
    tokens: tuple[int, ...]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Tokenise prompts as they are tokenised in training; an EOS that the tokenizer adds at the end is removed.

    Args:
        prompts: Texts.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: A prompt is not valid text, such as half of a surrogate pair.
    """
    check_texts(prompts)
    encoded = []
    for index, ids in enumerate(tokenizer(list(prompts), return_attention_mask=False)["input_ids"] if prompts else []):
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(Prompt(index, tuple(ids)))
    return encoded
