"""Checks a tokenizer against a model's embedding, which may lack tokens that were added to the tokenizer later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from meteora_core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def embedding_rows(model: nn.Module) -> int:
    """The number of tokens in the model's input embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def padding_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a padding token that the embedding has: the tokenizer's padding token, or else its end-of-sequence token.

    Padding is masked, so the choice does not change the results.

    Raises:
        CheckpointError: The embedding lacks the end-of-sequence token, so no answer could end.
    """
    rows, end = embedding_rows(model), int(tokenizer.eos_token_id)
    if end >= rows:
        raise CheckpointError(
            f"the tokenizer's end-of-sequence token {tokenizer.eos_token!r} is number {end}, but the model's embedding has {rows} rows", hint=_HINT
        )
    pad = tokenizer.pad_token_id
    return end if pad is None or int(pad) >= rows else int(pad)


def check_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[int]]) -> None:
    """Check that the model's embedding has every token of some texts.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the texts, for the name of a missing token.
        texts: Token ids of each text.

    Raises:
        DataError: The embedding lacks a token; the message names it.
    """
    rows = embedding_rows(model)
    if _largest(tokenizer) < rows:
        return
    for ids in texts:
        largest = max(ids, default=0)
        if largest >= rows:
            name = tokenizer.convert_ids_to_tokens(int(largest))
            raise DataError(f"a text has the token {name!r} (number {largest}), but the model's embedding has {rows} rows", hint=_HINT)


def _largest(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id that the tokenizer can produce."""
    return max(len(tokenizer) - 1, *getattr(tokenizer, "added_tokens_decoder", {}), 0)


_HINT = "use the tokenizer that belongs to the model, or resize the model with resize_token_embeddings(len(tokenizer)) and save it"
