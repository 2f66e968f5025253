"""Incremental decoding of tokens to text, in whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one. The texts joined are the whole text, including special tokens.

    A character that is spread over several tokens belongs to the last of them; the others have an empty text.

    Args:
        tokenizer: The tokenizer to decode with.
        ids: Token ids of the whole text.

    Returns:
        One text per token.
    """
    decoder = TextDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.add(token) for token in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


class TextDecoder:
    """Decoder that takes tokens one by one and returns whole characters only.

    Args:
        tokenizer: The tokenizer to decode with.
        skip_special_tokens: Whether to leave special tokens out of the text.

    Example::

        decoder = TextDecoder(tokenizer)
        for token in answer:
            print(decoder.add(token), end="")
        print(decoder.flush())
    """

    _WINDOW = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        self._pending.append(int(token))
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < self._WINDOW:
            return ""
        self._context = (self._context + self._pending)[-self._WINDOW :]
        self._pending = []
        return text

    def flush(self) -> str:
        """Return the text of the remaining tokens at the end; an incomplete character becomes U+FFFD."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)) if ids else ""
