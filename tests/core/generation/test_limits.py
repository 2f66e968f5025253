"""End tokens and contexts of models."""

from __future__ import annotations

from types import SimpleNamespace

from meteora_core.generation.limits import context_length
from support.chat_world import byte_llama


def test_a_model_without_a_stated_context_has_no_limit() -> None:
    without = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(hidden_size=8))
    assert context_length(SimpleNamespace(config=without)) is None
    assert context_length(byte_llama()) == 512
