"""The routes of one text, and every view that is drawn of them.

A prompt token is shown with the pass that read it, an answer token with the pass that wrote it: the one at the position before it. So the
last prompt token and the first answer token show the same pass.
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
    """One token as it is shown.

    Attributes:
        id: Its id.
        text: What it adds to the decoded text; empty in the middle of a character.
        role: Whether it was given or written.
    """

    id: int
    text: str
    role: Role


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one role with the same speaker.

    Attributes:
        start, end: Token positions, ``end`` excluded.
        role: Of all its tokens.
        adapter: Index of the speaker.
        shares: float32 (N,), mean weight of every adapter over tokens and layers.
        text: The tokens' text.
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
        tokens: T tokens.
        names: The N adapters.
        paths: The L layers, by module path.
        indices: int64 (T, L, k), the chosen adapters, best first.
        weights: float32 (T, L, k), summing to 1 over k.
        about: What to say of the model and settings, label to value.
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
        """The decoder layer of every path (-1 where a path has no number)."""
        return tuple(layer_number(path) for path in self.paths)

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every path: ``q``, ``k``, ``gate`` ..."""
        return tuple(layer_kind(path) for path in self.paths)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers, rising."""
        return tuple(sorted(set(self.layer_numbers)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers, in the model's order."""
        return tuple(dict.fromkeys(self.layer_kinds))

    def select(self, *, layer: int | None = None, kind: str | None = None) -> list[int]:
        """Positions in :attr:`paths` of one decoder layer, one kind, or both; None takes all."""
        places = zip(self.layer_numbers, self.layer_kinds, strict=True)
        return [place for place, (number, name) in enumerate(places) if layer in (None, number) and kind in (None, name)]

    def shares(self, places: Sequence[int] | None = None) -> Tensor:
        """Mean weight of every adapter per token over layers; float32 (T, N), rows sum to 1.

        Args:
            places: Positions in :attr:`paths`; None means all.
        """
        return mean_weights(*self._at(places), len(self.names))

    def votes(self, places: Sequence[int] | None = None) -> Tensor:
        """Share of the layers in which each adapter is the first choice; float32 (T, N), rows sum to 1."""
        return first_choices(self._at(places)[0], len(self.names))

    def speakers(self, places: Sequence[int] | None = None) -> Tensor:
        """Per token the adapter that most layers chose first (ties: the larger mean weight, then the lower index); int64 (T,)."""
        return speakers(*self._at(places), len(self.names))

    def _at(self, places: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        if places is None:
            return self.indices, self.weights
        return self.indices[:, list(places)], self.weights[:, list(places)]

    def rows(self, role: Role | None = None) -> Tensor:
        """bool (T,): the tokens of a role."""
        return torch.tensor([role in (None, token.role) for token in self.tokens], dtype=torch.bool)

    def spans(self, role: Role | None = None) -> list[Span]:
        """The text cut where the speaker or the role changes; only spans of ``role`` if it is given."""
        who, shares = self.speakers().tolist(), self.shares()
        spans: list[Span] = []
        start = 0
        for end in range(1, len(self.tokens) + 1):
            if end < len(self.tokens) and who[end] == who[start] and self.tokens[end].role == self.tokens[start].role:
                continue
            text = "".join(token.text for token in self.tokens[start:end])
            if role in (None, self.tokens[start].role):
                spans.append(Span(start, end, self.tokens[start].role, who[start], shares[start:end].mean(0), text))
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
        """A document for machines.

        Args:
            layers: Also give every token's chosen adapters and weights in every layer, as ``[[adapter index, weight], ...]`` per path.
        """
        shares, votes, who = self.shares(), self.votes(), self.speakers().tolist()
        tokens = []
        for position, token in enumerate(self.tokens):
            entry: dict[str, Any] = {"id": token.id, "text": token.text, "role": token.role, "adapter": self.names[who[position]]}
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
    """(T, L, k) routes as mean weights per token; float32 (T, N)."""
    flat = torch.zeros(indices.shape[0], adapters)
    if 0 in indices.shape:
        return flat
    return flat.scatter_add_(1, indices.reshape(indices.shape[0], -1), weights.float().reshape(indices.shape[0], -1)) / indices.shape[1]


def first_choices(indices: Tensor, adapters: int) -> Tensor:
    """(T, L, k) routes as the share of layers whose first choice each adapter is; float32 (T, N)."""
    return mean_weights(indices[..., :1], torch.ones(indices[..., :1].shape), adapters)


def speakers(indices: Tensor, weights: Tensor, adapters: int) -> Tensor:
    """Per token the adapter that most layers chose first; ties go to the larger mean weight, then to the lower index; int64 (T,)."""
    votes = first_choices(indices, adapters)
    best = votes >= votes.max(1, keepdim=True).values - 1e-6
    return mean_weights(indices, weights, adapters).masked_fill(~best, -1.0).argmax(1)


def layer_number(path: str) -> int:
    """The decoder layer that a module path names: its first number; -1 without one."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else -1


def layer_kind(path: str) -> str:
    """The kind of a linear: the last part of its path, without ``_proj``."""
    return path.rpartition(".")[2].removesuffix("_proj")
