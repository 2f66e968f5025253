"""The parts of OpenAI's answers: usage, log probabilities, routes, and server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from meteora_core.serving.jobs import Chosen, Done, TokenRoutes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 0.0005
"""Adapters with a smaller weight are left out of reported routes."""


def new_id(prefix: str) -> str:
    """A random id, such as ``chatcmpl-1f…``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event with a JSON value."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


DONE = b"data: [DONE]\n\n"


def usage(answers: Iterable[Done]) -> dict[str, Any]:
    """The field `usage` for some answers to one prompt each."""
    answers = list(answers)
    prompt, written = sum(done.prompt_tokens for done in answers), sum(done.tokens for done in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in answers)},
    }


def finish(done: Done) -> str:
    """The field `finish_reason`."""
    return "length" if done.reason == "length" else "stop"


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a single token."""
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Chosen]) -> dict[str, Any]:
    """The field `logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    for token in tokens:
        if token.logprob is not None:
            content.append({**entry(token.id, token.logprob), "top_logprobs": [entry(other, value) for other, value in token.top]})
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Chosen], offset: int) -> dict[str, Any]:
    """The field `logprobs` of a text completion, whose first token begins at character ``offset`` of the answer."""
    texts = [token_text(tokenizer, token.id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob or 0.0) for token in tokens],
        "top_logprobs": [{token_text(tokenizer, other): _finite(value) for other, value in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _finite(value: float) -> float:
    return max(value, -9999.0)


def routed_token(tokenizer: PreTrainedTokenizerBase, token: Chosen, names: Sequence[str]) -> dict[str, Any]:
    """The adapters of one token, by name."""
    routes = token.routes
    assert routes is not None
    entry: dict[str, Any] = {"id": token.id, "text": token.text, "token": token_text(tokenizer, token.id), "weights": mean_weights(routes, names)}
    if routes.indices is not None and routes.weights is not None:
        entry["layers"] = [
            {names[index]: round(weight, 4) for index, weight in zip(chosen, weights, strict=True) if abs(weight) >= LEAST}
            for chosen, weights in zip(routes.indices.tolist(), routes.weights.tolist(), strict=True)
        ]
    return entry


def mean_weights(routes: TokenRoutes, names: Sequence[str]) -> dict[str, float]:
    """The weights of one token averaged over the layers, by name, largest first."""
    pairs = [(name, round(weight, 4)) for name, weight in zip(names, routes.mean.tolist(), strict=True) if abs(weight) >= LEAST]
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def routes_body(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Chosen], names: Sequence[str]) -> dict[str, Any]:
    """The field `meteora` of a choice: the adapters of its tokens, and their shares of the answer."""
    routed = [token for token in tokens if token.routes is not None]
    body: dict[str, Any] = {"shares": {}, "tokens": [routed_token(tokenizer, token, names) for token in routed]}
    if routed:
        total: dict[str, float] = {}
        for token in routed:
            assert token.routes is not None
            for name, weight in zip(names, token.routes.mean.tolist(), strict=True):
                total[name] = total.get(name, 0.0) + weight / len(routed)
        body["shares"] = {name: round(share, 4) for name, share in sorted(total.items(), key=lambda pair: -pair[1]) if share >= LEAST}
        assert routed[0].routes is not None
        if routed[0].routes.paths:
            body["paths"] = list(routed[0].routes.paths)
    return body
