"""Recorded routes: the adapters that the layers chose, with their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from meteora_core.errors import UsageError


class Recorder(Protocol):
    """An object that receives the choices of the layers, such as :class:`Routes`."""

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Receive the choices of layer ``path`` in one forward call: int64 indices and float32 weights, (batch, tokens, k) or (tokens, k)."""

    def add_output(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Receive the choices of a layer that computes the model's logits; it may see only the last tokens of every row."""


@runtime_checkable
class ChosenRecorder(Recorder, Protocol):
    """A recorder that also takes choices as fused groups write them; for other recorders, layers run separately."""

    def add_chosen(self, path: str, chosen: Tensor, *, output: bool) -> None:
        """Receive the choices of layer ``path`` in one forward call.

        Args:
            path: Path of the layer in the model.
            chosen: Indices of the adapters, then their weights, float32 (tokens, 2 * k).
            output: Whether the layer computes the model's logits.
        """


@dataclass(frozen=True)
class RoutingDecision:
    """The choices of one layer for a batch of tokens.

    Attributes:
        indices: Indices of the chosen adapters, highest logit first, int64 (batch, tokens, k).
        weights: Mixing weights, float32 (batch, tokens, k); they sum to 1 over k.

    Raises:
        ValueError: The shapes differ or are not three-dimensional.
    """

    indices: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 3 or self.indices.shape != self.weights.shape:
            raise ValueError(f"a routing decision needs equal (batch, tokens, k) shapes, got {tuple(self.indices.shape)} and {tuple(self.weights.shape)}")


@dataclass
class Routes:
    """The choices of every layer during :func:`record_routes`, in the order of the forward calls.

    An output layer (``lm_head``) with adapters is recorded separately, because it may see only the last token of every row: :meth:`steps` returns its
    choices; :attr:`paths`, :meth:`packed` and :meth:`shares` leave it out.

    Attributes:
        names: The adapters' names, by index.
    """

    names: tuple[str, ...]
    _steps: dict[str, list[RoutingDecision]] = field(default_factory=dict)
    _outputs: dict[str, list[RoutingDecision]] = field(default_factory=dict)

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Append the choices of layer ``path`` in one forward call.

        Args:
            path: Path of the layer in the model.
            indices: Indices of the chosen adapters, int64 (batch, tokens, k) or (tokens, k).
            weights: Mixing weights, in the shape of ``indices``.

        Raises:
            UsageError: A CUDA graph is being captured; its replays would not be recorded.
        """
        self._steps.setdefault(path, []).append(_decision(indices, weights))

    def add_output(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Append the choices of an output layer, such as ``lm_head``. Arguments and errors are those of :meth:`add`."""
        self._outputs.setdefault(path, []).append(_decision(indices, weights))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the recorded layers, in the order of their first call."""
        return tuple(self._steps)

    def steps(self, path: str) -> list[RoutingDecision]:
        """The decisions of one layer, one per forward call."""
        return self._steps[path] if path in self._steps else self._outputs[path]

    def layer(self, path: str) -> RoutingDecision:
        """All calls of one layer, concatenated along the tokens, on the CPU.

        After ``generate`` with a cache, position ``t`` is token ``t`` of the padded prompt followed by the answer.

        Raises:
            ValueError: The batch size changed between calls.
        """
        steps = self.steps(path)
        if len({step.indices.shape[0] for step in steps}) > 1:
            raise ValueError(f"{path}: the batch size changed while routes were recorded; use steps() instead")
        return RoutingDecision(torch.cat([step.indices.cpu() for step in steps], 1), torch.cat([step.weights.cpu() for step in steps], 1))

    def packed(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """All decisions for one row of the batch: indices int64 and weights float32, both (tokens, layers, k), on the CPU.

        The order of the layers is that of :attr:`paths`. If k differs between forward calls (forced routes have k = 1), the smaller k is padded with weight 0.

        Raises:
            ValueError: The layers were not all called equally often.
        """
        calls = {len(steps) for steps in self._steps.values()}
        if len(calls) > 1:
            raise ValueError("some layers were called more often than others while routes were recorded; use steps() instead")
        if not calls or calls == {0}:
            empty = torch.zeros(0, len(self._steps), 1)
            return empty.long(), empty
        indices, weights = [], []
        for call in zip(*self._steps.values(), strict=True):
            device = call[0].indices.device  # the layers of a model may be on several devices
            indices.append(torch.stack([decision.indices.to(device) for decision in call], 2)[row].cpu())
            weights.append(torch.stack([decision.weights.to(device) for decision in call], 2)[row].cpu())
        width = max(part.shape[-1] for part in indices)
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in (*indices, *weights)]
        return torch.cat(padded[: len(indices)]), torch.cat(padded[len(indices) :])

    def clear(self) -> None:
        """Delete all recorded choices. The order of the layers is kept."""
        for steps in (*self._steps.values(), *self._outputs.values()):
            steps.clear()

    def shares(self, paths: Iterable[str] | None = None) -> Tensor:
        """The weight of every adapter for each token, averaged over layers.

        Args:
            paths: Paths of the layers to average over; None for all recorded layers.

        Returns:
            Mean weights, float32 (batch, tokens, N) on the CPU; they sum to 1 over the adapters.
        """
        paths = tuple(self._steps if paths is None else paths)
        total: Tensor | None = None
        for path in paths:
            decision = self.layer(path)
            dense = torch.zeros(*decision.indices.shape[:2], len(self.names)).scatter_add_(-1, decision.indices, decision.weights)
            total = dense if total is None else total + dense
        if total is None:
            return torch.zeros(0, 0, len(self.names))
        return total / len(paths)


def _decision(indices: Tensor, weights: Tensor) -> RoutingDecision:
    if indices.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError("routes cannot be recorded while a CUDA graph is captured", hint="leave record_routes before the capture")
    indices, weights = indices.detach(), weights.detach().float()
    return RoutingDecision(indices[None], weights[None]) if indices.ndim == 2 else RoutingDecision(indices, weights)
