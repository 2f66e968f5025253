"""Recording of a text's routes: reads the text once and returns a picture."""

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
    """Read a text once and record the adapters that every layer chooses.

    The model's current settings apply (forced and muted adapters, top-k, routing temperature). The routes equal those of token-by-token decoding up to
    rounding.

    Args:
        model: A model with adapters attached.
        tokenizer: The model's tokenizer.
        ids: Token ids of the text, at least one.
        roles: Role of each token; the first is "prompt".
        about: Captions of the picture, by label.
        on_read: Function called after each chunk with the number of tokens in it.

    Raises:
        UsageError: No adapters are attached to the model.
        DataError: The model's embedding has no row for one of the tokens.
        NonFiniteError: The model's logits or the mixing weights are NaN or infinite.
        ValueError: There are no tokens, the number of roles differs from that of tokens, or the first token has the role "answer".
    """
    if not ids or len(ids) != len(roles) or roles[0] != "prompt":
        raise ValueError("a trace needs at least one token, one role for each token, and a prompt before an answer")
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
    """Decode the token ids and combine each with its text and its role."""
    return tuple(Token(*token) for token in zip(ids, token_texts(tokenizer, ids), roles, strict=True))
