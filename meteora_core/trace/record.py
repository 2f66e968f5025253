"""From token ids to a picture: one pass over the text with the recorder on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.generation.nonfinite import non_finite_error, not_finite
from meteora_core.generation.text import token_texts
from meteora_core.model.caches import cache_argument, cache_of, new_cache, pieces_are_safe
from meteora_core.model.vocabulary import check_tokens
from meteora_core.routing import record_routes, routing_state
from meteora_core.trace.picture import Role, RoutePicture, Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 512
"""Tokens of a long text that are read in one forward pass: bounds the memory, and lets the reading be stopped."""


def trace_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    roles: Sequence[Role],
    *,
    about: dict[str, str] | None = None,
    on_read: Callable[[int], None] = lambda count: None,
) -> RoutePicture:
    """Read a text once and record what every layer chose.

    The routes are those of the settings in force (forced, muted, top_k, T). They equal the ones of token-by-token decoding up to rounding.

    Args:
        model: A model with adapters attached.
        tokenizer: Its tokenizer.
        ids: The text's token ids, at least one.
        roles: One per token; the first is "prompt".
        about: Shown with the picture.
        on_read: Called after each chunk with its number of tokens.

    Raises:
        UsageError: Nothing is attached to the model.
        DataError: A token is beyond the model's embedding.
        NonFiniteError: The model's logits or its gates' weights are NaN or infinite.
        ValueError: There are no tokens, or not one role a token, or the first token is an answer.
    """
    if not ids or len(ids) != len(roles) or roles[0] != "prompt":
        raise ValueError("a trace needs at least one token, one role a token, and a prompt before an answer")
    names = routing_state(model).names
    check_tokens(model, tokenizer, [ids])
    name, cache = cache_argument(model), new_cache(model)
    passes = len(ids) - 1 if roles[-1] == "answer" else len(ids)
    with torch.inference_mode():
        piece = CHUNK if pieces_are_safe(model) else passes
        with record_routes(model) as routes:
            for start in range(0, passes, piece):
                chunk = torch.tensor([ids[start : min(start + piece, passes)]], device=model.device)
                output = model(chunk, use_cache=True, **{name: cache}, **last_logits_only(model))
                cache, broken = cache_of(model, output), bool(not_finite(output.logits[0, -1]))
                if broken:
                    break
                on_read(chunk.shape[1])
    if broken:
        raise non_finite_error(model, ids)
    indices, weights = routes.packed()
    if not bool(weights.isfinite().all()):
        raise non_finite_error(model, ids)
    rows = torch.tensor([position - (role == "answer") for position, role in enumerate(roles)])
    return RoutePicture(make_tokens(tokenizer, ids, roles), names, routes.paths, indices[rows], weights[rows], about or {})


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """The argument that spares a forward pass the vocabulary's logits of all positions but the last; empty where a model has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def make_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], roles: Sequence[Role]) -> tuple[Token, ...]:
    """Tokens with their texts and roles."""
    return tuple(Token(*token) for token in zip(ids, token_texts(tokenizer, ids), roles, strict=True))
