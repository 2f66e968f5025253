"""Where a model's answer must stop: its end tokens, and its context."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can look at; None when its configuration does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and those of the generation configuration."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)
