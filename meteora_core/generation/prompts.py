"""Tokenisation of prompts."""

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
        index: Index of the row in the dataset.
        tokens: Token ids, beginning with the BOS token if the tokenizer adds one.
    """

    index: int
    tokens: tuple[int, ...]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Tokenise prompts as training does. End tokens that the tokenizer appends are removed.

    Args:
        prompts: The texts of the prompts.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: A prompt is not valid text; for example, it contains half of a surrogate pair.
    """
    check_texts(prompts)
    encoded = []
    for index, ids in enumerate(tokenizer(list(prompts), return_attention_mask=False)["input_ids"] if prompts else []):
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(Prompt(index, tuple(ids)))
    return encoded
