"""From token ids to a picture: one pass over the text with the recorder on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora_core.generation.engine import Engine
from meteora_core.generation.nonfinite import non_finite_error
from meteora_core.generation.requests import Request
from meteora_core.generation.text import token_texts
from meteora_core.model.vocabulary import check_tokens
from meteora_core.routing import meteora_of
from meteora_core.trace.picture import Role, RoutePicture, Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    names = meteora_of(model).names
    check_tokens(model, tokenizer, [ids])
    read = ids[: len(ids) - 1] if roles[-1] == "answer" else ids
    parts: list[tuple[Tensor, Tensor]] = []
    paths: tuple[str, ...] = ()
    for reading in Engine(model, tokenizer, "off").read(Request(read, record=True)):
        assert reading.routes is not None
        on_read(len(reading.routes[0]))
        parts.append(reading.routes)
        paths = reading.paths
    indices, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(weights.isfinite().all()):
        raise non_finite_error(model, ids)
    rows = torch.tensor([position - (role == "answer") for position, role in enumerate(roles)])
    return RoutePicture(make_tokens(tokenizer, ids, roles), names, paths, indices[rows], weights[rows], about or {})


def make_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], roles: Sequence[Role]) -> tuple[Token, ...]:
    """Tokens with their texts and roles."""
    return tuple(Token(*token) for token in zip(ids, token_texts(tokenizer, ids), roles, strict=True))
