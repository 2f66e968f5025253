"""From token ids to a picture: one pass over the text with the recorder on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.evaluation.nonfinite import non_finite_error, not_finite
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


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; joined they are the whole, special tokens included.

    A character that is spread over several tokens belongs to the last of them; the others have an empty text.
    """
    decoder = TextDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.add(token) for token in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


class TextDecoder:
    """Turns tokens into text as they come, whole characters only.

    Args:
        tokenizer: Any tokenizer.
        skip_special_tokens: Whether special tokens give no text.
    """

    _WINDOW = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that became complete with ``token``."""
        self._pending.append(int(token))
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < self._WINDOW:
            return ""
        self._context = (self._context + self._pending)[-self._WINDOW :]
        self._pending = []
        return text

    def flush(self) -> str:
        """What is left at the end: an incomplete character shows as U+FFFD."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)) if ids else ""
