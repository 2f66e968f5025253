"""The tiny world, built once, and a tiny model for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.chat.chat_model import ChatModel
from meteora_core.model.attach import meteora_layers
from support.chat_world import World, build_world, open_chat_model, without_ends
from support.tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base model, adapters and a checkpoint on disk."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def speaker(world: World) -> ChatModel:
    """The checkpoint, loaded anew, which never ends an answer by itself."""
    opened = open_chat_model(world)
    without_ends(opened.model)
    return opened


@pytest.fixture
def gpu_model(make_adapter: Callable[..., Path]) -> Any:
    """A tiny Llama on the GPU with three adapters of different ranks on all linears, float32."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folders = {name: make_adapter(name, seed, r=4 + seed, target_modules=names) for seed, name in enumerate(("one", "two", "three"))}
    attached = attach(make_tiny_llama(initializer_range=0.3), AdapterBank.from_peft(folders)).to("cuda")
    with torch.no_grad():
        for _, layer in meteora_layers(attached):
            layer.gate.mul_(30)
    return attached
