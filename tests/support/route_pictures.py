"""Pictures of random routes."""

from __future__ import annotations

import torch

from meteora_core.trace.picture import RoutePicture, Token


def make_picture(texts: list[str], answers: int = 2, adapters: int = 3, seed: int = 0) -> RoutePicture:
    """Random routes over 4 layers of 2 kinds."""
    generator = torch.Generator().manual_seed(seed)
    paths = tuple(f"model.layers.{layer}.{kind}_proj" for layer in range(4) for kind in ("q", "up"))
    scores = torch.rand(len(texts), len(paths), adapters, generator=generator)
    top = scores.topk(min(2, adapters), -1)
    roles = ["prompt"] * (len(texts) - answers) + ["answer"] * answers
    tokens = tuple(Token(10 + index, *pair) for index, pair in enumerate(zip(texts, roles, strict=True)))
    names = tuple(["<b>first</b>", "second & co", "third"][:adapters]) + tuple(f"adapter_{index}" for index in range(3, adapters))
    return RoutePicture(tokens, names, paths, top.indices, torch.softmax(top.values * 3, -1), {"model": "<i>x</i>"})
