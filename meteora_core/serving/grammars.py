"""Restricts answers to a grammar, such as a JSON schema, with llguidance."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_OBJECT = {"type": "object"}
"""The schema of ``response_format: {"type": "json_object"}``."""
_MOST_SCHEMA = 200_000


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: The model's tokenizer.
        vocabulary: Number of tokens for which the model computes logits.
        ends: Ids of the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: tuple[int, ...]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._known: Any = None
        self._lock = threading.Lock()

    def tokens(self) -> Any:
        """The tokenizer in llguidance's format, which is built at the first call. Raises MeteoraError if llguidance cannot use it."""
        with self._lock:
            if self._known is None:
                try:
                    from llguidance.hf import from_tokenizer
                except ImportError as missing:
                    raise MeteoraError("structured answers need llguidance", hint="pip install 'meteora-lora[serve]'") from missing
                try:
                    self._known = from_tokenizer(self._tokenizer, self._vocabulary, list(self._ends) or None)
                except (ValueError, RuntimeError, TypeError, AttributeError) as error:
                    raise MeteoraError(f"this tokenizer cannot be used for structured answers: {one_line(str(error), limit=200)}") from error
            return self._known

    def of_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of a JSON schema. Raises UsageError if the schema is invalid or not supported."""
        self.tokens()
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > _MOST_SCHEMA:
            raise UsageError("the JSON schema is too large", hint=f"use at most {_MOST_SCHEMA:,} characters")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        except (ValueError, TypeError) as error:
            raise _refused(str(error)) from error
        problem = LLMatcher.validate_grammar(grammar, self._known)
        if problem:
            raise _refused(problem)
        return grammar

    def matcher(self, grammar: str) -> Matcher:
        """The state of one answer. Raises UsageError if the grammar is invalid."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokens(), grammar)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Matcher(matcher)


def _refused(problem: str) -> UsageError:
    return UsageError(f"the JSON schema cannot be used: {one_line(problem, limit=300)}", hint="use a JSON Schema of draft 2020-12 without unsupported keywords")


class Matcher:
    """The position of one answer in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, scores: Tensor) -> Tensor:
        """Scores (vocabulary,), with minus infinity for the tokens that the grammar does not allow next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(-1)[: scores.shape[0]]
        if allowed.shape[0] < scores.shape[0]:
            allowed = torch.nn.functional.pad(allowed, (0, scores.shape[0] - allowed.shape[0]))
        if not bool(allowed.any()):
            return scores
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def accept(self, token: int) -> bool:
        """Move past a token. Returns whether the answer is complete."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped()) or bool(self._matcher.is_error())
