"""The limits of a model's answers: its end tokens and its context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora_core.routing import find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def context_length(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model can attend to, or None if its configuration does not give it."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end an answer: of the tokenizer, the model's generation configuration, and the prompt frames that adapters were trained on."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    state = find_meteora(model)
    frames = [] if state is None else [adapter.frame for adapter in state.adapters]
    trained = [frame.end_id(tokenizer) for frame in frames if frame is not None]
    return frozenset(int(token) for token in (*several, *trained, tokenizer.eos_token_id) if token is not None)
