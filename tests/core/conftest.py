"""The tiny world, built once."""

from __future__ import annotations

import pytest

from meteora_core.chat.speaker import Speaker
from support.chat_world import World, build_world, open_speaker, without_ends


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base model, adapters and a checkpoint on disk."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def speaker(world: World) -> Speaker:
    """The checkpoint, loaded anew, which never ends an answer by itself."""
    opened = open_speaker(world)
    without_ends(opened.model)
    return opened
