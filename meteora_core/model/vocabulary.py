"""Where a tokenizer and a model's embedding disagree: a padding token that was added later, tokens that the embedding does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from meteora_core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def embedding_rows(model: nn.Module) -> int:
    """How many tokens the model's input embedding has."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def padding_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with that the embedding has: the tokenizer's padding token, or else its end-of-sequence token. Padding is masked, so any will do.

    Raises:
        CheckpointError: The end-of-sequence token itself is beyond the embedding, so that no answer could end.
    """
    rows, end = embedding_rows(model), int(tokenizer.eos_token_id)
    if end >= rows:
        raise CheckpointError(
            f"the tokenizer's end-of-sequence token {tokenizer.eos_token!r} is number {end}, but the model's embedding has {rows} rows", hint=_HINT
        )
    pad = tokenizer.pad_token_id
    return end if pad is None or int(pad) >= rows else int(pad)


def check_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[int]]) -> None:
    """Raise DataError, which names the token, when a text has one that the model's embedding does not have.

    Args:
        model: A causal language model.
        tokenizer: For the token's name.
        texts: Token ids.
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
    """The largest token that the tokenizer can give."""
    return max(len(tokenizer) - 1, *getattr(tokenizer, "added_tokens_decoder", {}), 0)


_HINT = "use the tokenizer that belongs to the model, or resize the model with resize_token_embeddings(len(tokenizer)) and save it"
