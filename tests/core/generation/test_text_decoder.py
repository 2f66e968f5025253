"""Incremental decoding of tokens to text."""

from __future__ import annotations

from meteora_core.generation.text import TextDecoder, token_texts
from support.chat_world import byte_tokenizer


def test_text_comes_in_whole_characters() -> None:
    text = "h\u00e9llo 日本 🎉 end"
    ids = byte_tokenizer()(text)["input_ids"]
    decoder = TextDecoder(byte_tokenizer())
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)
    assert token_texts(byte_tokenizer(), [*ids, 2, ids[8]]) == [*pieces, "</s>", "\N{REPLACEMENT CHARACTER}"]


def test_texts_join_to_the_whole() -> None:
    text = "héllo 日本語 🎉👩‍👩‍👧 <b>&amp;\n\n\tend"
    tokenizer = byte_tokenizer()
    assert "".join(token_texts(tokenizer, tokenizer(text)["input_ids"])) == text
    assert token_texts(tokenizer, []) == []
