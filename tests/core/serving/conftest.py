"""A server of a tiny model with a tokenizer of bytes and three adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meteora_core.chat.chat_model import ChatModel
from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import Access
from support.chat_world import World, build_world, open_chat_model
from support.server import RunningServer, running_server

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def chat_model(world: World) -> ChatModel:
    return open_chat_model(world)


@pytest.fixture
def fresh_model(world: World) -> ChatModel:
    """A second copy of the model, for a test that starts a server of its own."""
    return open_chat_model(world)


@pytest.fixture(scope="module")
def server(chat_model: ChatModel) -> Iterator[RunningServer]:
    with running_server(chat_model, AppOptions(Access((KEY,)))) as running:
        yield running
