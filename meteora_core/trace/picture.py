"""The routes of one text, and the summaries of them that are drawn.

A prompt token is shown with the routes of the position that read it, an answer token with the routes of the position that generated it, which is the one
before it. So the last prompt token and the first answer token show the same routes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["prompt", "answer"]
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Token:
    """One token of the text.

    Attributes:
        id: Token id.
        text: Text that the token adds to the decoded text; empty in the middle of a character.
        role: "prompt" for a token that was given, "answer" for one that the model generated.
    """

    id: int
    text: str
    role: Role


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one role with the same speaker.

    Attributes:
        start, end: Positions of the first token and after the last token.
        role: Role of all tokens in the span.
        adapter: Index of the speaker.
        shares: Mean weight of every adapter over the span's tokens and all layers, float32 (N,).
        text: Text of the tokens.
    """

    start: int
    end: int
    role: Role
    adapter: int
    shares: Tensor
    text: str


@dataclass(frozen=True)
class RoutePicture:
    """Which adapters every layer chose for every token of one text.

    Attributes:
        tokens: Tokens of the text.
        names: Names of the N adapters.
        paths: Module paths of the layers.
        indices: Indices of the chosen adapters, best first, int64 (tokens, layers, k).
        weights: Mixing weights of the chosen adapters, float32 (tokens, layers, k); they sum to 1 over k.
        about: Captions about the model and the settings, by label.
    """

    tokens: tuple[Token, ...]
    names: tuple[str, ...]
    paths: tuple[str, ...]
    indices: Tensor
    weights: Tensor
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.indices.shape != self.weights.shape or self.indices.shape[:2] != (len(self.tokens), len(self.paths)):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.paths)} layers do not fit routes of shape {tuple(self.indices.shape)}")

    @cached_property
    def layer_numbers(self) -> tuple[int, ...]:
        """Number of the decoder layer of every path; -1 for a path without a number."""
        return tuple(layer_number(path) for path in self.paths)

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kind of every path, such as ``q``, ``k`` or ``gate``."""
        return tuple(layer_kind(path) for path in self.paths)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the decoder layers in ascending order."""
        return tuple(sorted(set(self.layer_numbers)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers in the model's order."""
        return tuple(dict.fromkeys(self.layer_kinds))

    def select(self, *, layer: int | None = None, kind: str | None = None) -> list[int]:
        """Indices into :attr:`paths` of the layers with this decoder layer number and this kind; None selects all."""
        layers = zip(self.layer_numbers, self.layer_kinds, strict=True)
        return [index for index, (number, name) in enumerate(layers) if layer in (None, number) and kind in (None, name)]

    def shares(self, layers: Sequence[int] | None = None) -> Tensor:
        """Mean weight of every adapter over layers, for each token; float32 (tokens, N), rows sum to 1.

        Args:
            layers: Indices into :attr:`paths`; None means all layers.
        """
        return mean_weights(*self._at(layers), len(self.names))

    def votes(self, layers: Sequence[int] | None = None) -> Tensor:
        """Share of the layers that choose each adapter first, for each token; float32 (tokens, N), rows sum to 1."""
        return first_choices(self._at(layers)[0], len(self.names))

    def speakers(self, layers: Sequence[int] | None = None) -> Tensor:
        """Index of each token's speaker, the adapter that most layers chose first; int64 (tokens,).

        Ties go to the larger mean weight, then to the lower index.
        """
        return speakers(*self._at(layers), len(self.names))

    def _at(self, layers: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        if layers is None:
            return self.indices, self.weights
        return self.indices[:, list(layers)], self.weights[:, list(layers)]

    def rows(self, role: Role | None = None) -> Tensor:
        """Whether each token has this role; bool (tokens,). None selects all tokens."""
        return torch.tensor([role in (None, token.role) for token in self.tokens], dtype=torch.bool)

    def spans(self, role: Role | None = None) -> list[Span]:
        """Split the text where the speaker or the role changes. Returns only the spans with this role unless it is None."""
        speaking, shares = self.speakers().tolist(), self.shares()
        spans: list[Span] = []
        start = 0
        for end in range(1, len(self.tokens) + 1):
            if end < len(self.tokens) and speaking[end] == speaking[start] and self.tokens[end].role == self.tokens[start].role:
                continue
            text = "".join(token.text for token in self.tokens[start:end])
            if role in (None, self.tokens[start].role):
                spans.append(Span(start, end, self.tokens[start].role, speaking[start], shares[start:end].mean(0), text))
            start = end
        return spans

    def by_layer(self, role: Role | None = None) -> Tensor:
        """Mean weight of every adapter in every decoder layer, over the tokens of a role; float32 (layers, N)."""
        rows = self.rows(role)
        return self._table([self.select(layer=number) for number in self.layers], rows)

    def by_kind(self, role: Role | None = None) -> Tensor:
        """Mean weight of every adapter in every kind of layer, over the tokens of a role; float32 (kinds, N)."""
        return self._table([self.select(kind=kind) for kind in self.kinds], self.rows(role))

    def _table(self, groups: list[list[int]], rows: Tensor) -> Tensor:
        if not groups or not bool(rows.any()):
            return torch.zeros(len(groups), len(self.names))
        return torch.stack([self.shares(group)[rows].mean(0) for group in groups])

    def total(self, role: Role | None = None) -> Tensor:
        """Mean weight of every adapter over the tokens of a role and all layers; float32 (N,)."""
        rows = self.rows(role)
        return self.shares()[rows].mean(0) if bool(rows.any()) else torch.zeros(len(self.names))

    def since(self, start: int) -> RoutePicture:
        """The picture of the tokens from ``start`` on."""
        return RoutePicture(self.tokens[start:], self.names, self.paths, self.indices[start:], self.weights[start:], self.about)

    def to_json(self, *, layers: bool = True) -> dict[str, Any]:
        """The picture as plain values for JSON.

        Args:
            layers: Whether to include the chosen adapters and weights of every token in every layer, as ``[[adapter index, weight], ...]`` per path.
        """
        shares, votes, speaking = self.shares(), self.votes(), self.speakers().tolist()
        tokens = []
        for position, token in enumerate(self.tokens):
            entry: dict[str, Any] = {"id": token.id, "text": token.text, "role": token.role, "adapter": self.names[speaking[position]]}
            entry["shares"] = _named(self.names, shares[position])
            entry["first_choices"] = _named(self.names, votes[position])
            if layers:
                pairs = zip(self.indices[position].tolist(), self.weights[position].tolist(), strict=True)
                entry["layers"] = [[[index, round(weight, 4)] for index, weight in zip(*pair, strict=True)] for pair in pairs]
            tokens.append(entry)
        return {
            "about": self.about,
            "adapters": list(self.names),
            "paths": list(self.paths),
            "tokens": tokens,
            "spans": [
                {
                    "start": span.start,
                    "end": span.end,
                    "role": span.role,
                    "adapter": self.names[span.adapter],
                    "text": span.text,
                    "shares": _named(self.names, span.shares),
                }
                for span in self.spans()
            ],
            "by_kind": {kind: _named(self.names, row) for kind, row in zip(self.kinds, self.by_kind("answer"), strict=True)},
        }


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return {name: round(value, 4) for name, value in zip(names, values.tolist(), strict=True) if value > 0}


def mean_weights(indices: Tensor, weights: Tensor, adapters: int) -> Tensor:
    """Mean weight of every adapter over layers, for each token; float32 (tokens, N).

    Args:
        indices: Indices of the chosen adapters, int64 (tokens, layers, k).
        weights: Mixing weights of the chosen adapters, floating point (tokens, layers, k).
        adapters: Number N of adapters.
    """
    flat = torch.zeros(indices.shape[0], adapters)
    if 0 in indices.shape:
        return flat
    return flat.scatter_add_(1, indices.reshape(indices.shape[0], -1), weights.float().reshape(indices.shape[0], -1)) / indices.shape[1]


def first_choices(indices: Tensor, adapters: int) -> Tensor:
    """Share of the layers that choose each adapter first, for each token; float32 (tokens, N). Arguments as for :func:`mean_weights`."""
    return mean_weights(indices[..., :1], torch.ones(indices[..., :1].shape), adapters)


def speakers(indices: Tensor, weights: Tensor, adapters: int) -> Tensor:
    """Index of each token's speaker, the adapter that most layers chose first; int64 (tokens,). Arguments as for :func:`mean_weights`.

    Ties go to the larger mean weight, then to the lower index.
    """
    votes = first_choices(indices, adapters)
    best = votes >= votes.max(1, keepdim=True).values - 1e-6
    return mean_weights(indices, weights, adapters).masked_fill(~best, -1.0).argmax(1)


def layer_number(path: str) -> int:
    """Number of the decoder layer in a module path, which is the path's first number; -1 if it has none."""
    match = _NUMBER.search(path)
    return int(match[1]) if match else -1


def layer_kind(path: str) -> str:
    """Kind of a linear layer: the last part of its module path, without ``_proj``."""
    return path.rpartition(".")[2].removesuffix("_proj")
