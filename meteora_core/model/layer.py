"""One linear layer that carries many adapters and a gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.model.tokens import forced_routes, token_shape
from meteora_core.routing import IGNORE, RoutingState
from meteora_kernels import lora_mixture, route


class MeteoraLinear(nn.Module):
    """``y = W x + sum_j w_j s_{i_j} B_{i_j} A_{i_j} dropout(x)``, the top-k ``i_j`` chosen per token by ``G x``.

    Formulas in :mod:`meteora_kernels.reference` (MeteoRA, arXiv 2405.13053, section 3).

    Args:
        base_layer: The linear that is wrapped; it stays as it is.
        path: Its name in the model.
        gate: (N, in), the gate's rows, one an adapter.
        lora_A: (R, in), all A by rows.
        lora_B: (R, out), row ``j`` is column ``j`` of the usual (out, R) matrix.
        scaling: float32 (N,).
        ranks: One rank an adapter; 0 where an adapter does not target this layer.
        state: Shared by all layers of the model.
        dropout: Probability, applied in training to what the adapters (not the gate) see.

    Attributes:
        is_output: Whether this layer makes the model's logits; it may be called with the last tokens of every row alone.
    """

    scaling: Tensor
    offsets: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        path: str,
        gate: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        ranks: tuple[int, ...],
        state: RoutingState,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.ranks = ranks
        self.max_rank = max(ranks)
        self.dropout = dropout
        self.is_output = False
        self.state = state
        self.gate = nn.Parameter(gate)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B, requires_grad=False)
        offsets = torch.zeros(len(ranks) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor(ranks).cumsum(0)
        self.register_buffer("scaling", scaling.to(gate.device), persistent=False)
        self.register_buffer("offsets", offsets.to(gate.device), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> MeteoraLinear:
        """A copy that computes with its own weights: where this layer runs as part of a fused group, the copy runs alone."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy({name: value for name, value in vars(self).items() if name != "forward"}, memo))
        return made

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MeteoraLinear:
        """Scalings stay float32 and as they are when the model changes its dtype: in 16 bits they would be rounded for good."""
        exact = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scaling.dtype != exact.dtype and not exact.is_meta:
            self.scaling = exact.to(self.scaling.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """``weight`` and ``bias`` are the base layer's: a model that ties its output layer to the embedding sets them here."""
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def in_features(self) -> int:
        return self.gate.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[1]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (some models look at it to learn a dtype)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        output = self.base_layer(x)
        state = self.state
        if not state.enabled:
            return output
        gate: Tensor = self.gate
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if gate.dtype != x.dtype:
            gate = gate.to(x.dtype)
        if lora_A.dtype != x.dtype:
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        lora_x = F.dropout(x, self.dropout) if self.dropout and self.training else None
        if state.observed:
            return self._observed(x, output, gate, lora_A, lora_B, lora_x)
        mixed = lora_mixture(
            x,
            output,
            gate,
            lora_A,
            lora_B,
            self.scaling,
            self.offsets,
            top_k=state.top_k,
            temperature=state.temperature,
            lora_x=lora_x,
            allowed=self._allowed(),
            backend=state.backend,
            max_rank=self.max_rank,
        )
        assert isinstance(mixed, Tensor)
        return mixed

    def _allowed(self) -> Tensor | None:
        allowed = self.state.allowed
        return None if allowed is None else self.state.on(allowed, self.gate.device)

    def _observed(self, x: Tensor, output: Tensor, gate: Tensor, lora_A: Tensor, lora_B: Tensor, lora_x: Tensor | None) -> Tensor:
        """The same, while routes are forced, gates are labelled, or a recorder listens."""
        state = self.state
        arguments = (x, output, gate, lora_A, lora_B, self.scaling, self.offsets)
        top_k, temperature, allowed = state.top_k, state.temperature, self._allowed()
        if state.forced is not None:
            routes = forced_routes(self, state.on(state.forced, x.device), x)
            mixed = lora_mixture(*arguments, lora_x=lora_x, routes=routes, top_k=1, backend=state.backend, max_rank=self.max_rank)
            assert isinstance(mixed, Tensor)
            self._record(x, *routes)
            return mixed
        mixed, logits = lora_mixture(
            *arguments, lora_x=lora_x, top_k=top_k, temperature=temperature, allowed=allowed, backend=state.backend, max_rank=self.max_rank, return_logits=True
        )
        if state.recorder is not None:
            self._record(x, *route(logits.detach(), top_k, temperature, allowed))
        if state.gate_labels is not None and state.observations is not None:
            self._label(F.linear(x.detach(), gate) if state.gates_alone else logits, token_shape(self, x))
        return mixed

    def _record(self, x: Tensor, indices: Tensor, weights: Tensor) -> None:
        recorder = self.state.recorder
        if recorder is not None:
            shape = (*token_shape(self, x), indices.shape[-1])
            add = recorder.add_output if self.is_output else recorder.add
            add(self.path, indices.reshape(shape), weights.reshape(shape))

    def _label(self, logits: Tensor, shape: torch.Size) -> None:
        """Compare gate logits, of tokens laid out as ``shape``, with the labels; an output layer may see the last tokens of every row alone."""
        state = self.state
        labels, observations = state.gate_labels, state.observations
        assert labels is not None
        assert observations is not None
        last = shape[-1] if self.is_output and labels.ndim == len(shape) == 2 else labels.shape[-1]
        seen = labels[..., labels.shape[-1] - last :]
        if seen.numel() != shape.numel():
            raise UsageError(
                f"gates are labelled for a batch of shape {tuple(labels.shape)}, but {self.path} sees one of shape {tuple(shape)}",
                hint="give labels for the very batch that the model gets",
            )
        flat = logits.reshape(-1, logits.shape[-1])
        wide = flat if flat.dtype == torch.float64 else flat.float()
        weights = observations.weights  # autocast leaves float32 alone here
        targets = seen.reshape(-1).to(flat.device)
        losses = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum" if weights is None else "none")
        if weights is not None:
            losses = (losses * weights.reshape(labels.shape)[..., labels.shape[-1] - last :].reshape(-1).to(flat.device)).sum()
        observations.loss_sums.append(losses.to(labels.device))
        if state.keep_hits:
            hits = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
            hits[..., labels.shape[-1] - last :] = (flat.detach().argmax(-1) == targets).reshape(seen.shape).to(labels.device)
            observations.hits[self.path] = hits.reshape(-1)

    def extra_repr(self) -> str:
        return f"adapters={len(self.ranks)}, total_rank={sum(self.ranks)}, in={self.in_features}, out={self.out_features}"
