"""Tokens as text: whole characters as they come, and what each token adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are the whole text, special tokens included.

    A character that is spread over several tokens belongs to the last of them; the others have an empty text.

    Args:
        tokenizer: Any tokenizer.
        ids: Token ids.

    Returns:
        One text per token.
    """
    decoder = TextDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.add(token) for token in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


class TextDecoder:
    """Turns tokens into text one by one, whole characters only.

    Args:
        tokenizer: Any tokenizer.
        skip_special_tokens: Whether special tokens give no text.

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
        """The text that became complete with ``token``; may be empty."""
        self._pending.append(int(token))
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < self._WINDOW:
            return ""
        self._context = (self._context + self._pending)[-self._WINDOW :]
        self._pending = []
        return text

    def flush(self) -> str:
        """The text of the tokens that are left at the end: an incomplete character shows as U+FFFD."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)) if ids else ""
