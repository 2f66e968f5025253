"""One linear layer that carries many adapters and a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.adapters.stack import Stack
from meteora_core.model.linears import WrappedLinear, float_table
from meteora_core.model.observe import mix_observed
from meteora_core.routing import Meteora
from meteora_core.tensors import is_quantized
from meteora_kernels import Adapters, Routing, mix, mix_over, route


class LayerGroup(Protocol):
    """Layers that share their input and run as one; :class:`meteora_core.fused.group.FusedGroup` is one."""

    def output(self, member: int, x: Tensor) -> Tensor | None:
        """The output of a member for its input (..., in), or None if the layer has to compute it itself."""


class MeteoraLinear(WrappedLinear):
    """``y = W x + sum_j w_j s_{i_j} B_{i_j} A_{i_j} dropout(x)``, the top-k ``i_j`` chosen per token by ``G x``.

    Formulas in :mod:`meteora_kernels.reference` (MeteoRA, arXiv 2405.13053, section 3). Adapters that scale the base layer's output (DoRA) or shift the
    output (biases) add ``sum_j w_j (scale_{i_j} * W x + shift_{i_j})`` to it; such a layer computes its routes here and passes them on.

    Args:
        base_layer: The linear layer that is wrapped; it is not changed.
        path: Name of the layer in the model.
        gate: Gate weights (N, in), one row for each adapter.
        stack: The adapters' weights, in the dtype and on the device of ``gate``, without pending parts.
        state: Routing state, which all layers of the model share.
        dropout: Dropout probability of the adapters' (not the gate's) input during training.

    Attributes:
        is_output: Whether this layer computes the model's logits; it may be called with only the last tokens of every row.
        is_plain: Whether all adapters are plain LoRA, which add ``s B A x`` alone; fused groups take only such layers.
        group: The group that this layer runs as part of, or None; :func:`meteora_core.fuse` makes groups.
        member: The index of this layer in its group.
    """

    scaling: Tensor
    offsets: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        path: str,
        gate: Tensor,
        stack: Stack,
        state: Meteora,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.ranks = stack.ranks
        self.max_rank = max(stack.ranks)
        self.dropout = dropout
        self.is_output = False
        self.is_plain = stack.scale is None and stack.shift is None
        weight = getattr(base_layer, "weight", None)
        self.is_quantized = weight is None or is_quantized(weight)
        self.group: LayerGroup | None = None
        self.member = 0
        self.state = state
        self.gate = nn.Parameter(gate)
        self.lora_A = nn.Parameter(stack.A, requires_grad=False)
        self.lora_B = nn.Parameter(stack.B, requires_grad=False)
        offsets = torch.zeros(len(stack.ranks) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor(stack.ranks).cumsum(0)
        self.register_buffer("scaling", stack.scaling.to(gate.device), persistent=False)
        self.register_buffer("offsets", offsets.to(gate.device), persistent=False)
        self.register_buffer("scale", float_table(stack.scale, gate.device), persistent=False)
        self.register_buffer("shift", float_table(stack.shift, gate.device), persistent=False)

    def join(self, group: LayerGroup, member: int) -> None:
        """Run as a member of a group from now on, wherever the group can."""
        self.group, self.member = group, member

    def leave(self) -> None:
        """Run alone from now on."""
        self.group = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a layer have separate weights, so they belong to no group."""
        return {**vars(self), "group": None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MeteoraLinear:
        """Keep the scalings in float32 when the model changes its dtype, because rounding to 16 bits could not be undone."""
        exact = {name: getattr(self, name) for name in ("scaling", "scale", "shift") if getattr(self, name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype != before.dtype and not before.is_meta:
                setattr(self, name, before.to(now.device))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set ``weight`` and ``bias`` on the base layer: a model that ties its output layer to the embedding assigns them."""
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
    def stack(self) -> Stack:
        """The adapters' weights as they are now."""
        scaling = self.scaling.detach().cpu()
        return Stack(self.lora_A.detach(), self.lora_B.detach(), tuple(self.ranks), scaling, self.scale, self.shift)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.group is not None and (fused := self.group.output(self.member, x)) is not None:
            return fused
        state = self.state
        mode = state.mode
        if not mode.enabled:
            return self.base_layer(x)
        adapters = self._adapters(x.dtype)
        if self.is_quantized and self.is_plain and not mode.observed and not (self.dropout and self.training):
            return mix_over(x, self.base_layer, adapters, state.routing_on(x.device), backend=state.backend)
        output = self.base_layer(x)
        lora_x = F.dropout(x, self.dropout) if self.dropout and self.training else None
        if mode.observed:
            return mix_observed(self, x, output, adapters, lora_x)
        routing = state.routing_on(x.device)
        if not self.is_plain:
            indices, weights = route(F.linear(x, adapters.gate), routing.top_k, routing.temperature, routing.allowed)
            output, routing = self.adjusted(output, indices, weights), Routing(routing.top_k, indices=indices, weights=weights)
        mixed = mix(x, output, adapters, routing, lora_x=lora_x, backend=state.backend)
        assert isinstance(mixed, Tensor)
        return mixed

    def adjusted(self, output: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Add what chosen adapters add to the base layer's output besides ``s B A x``; see :class:`meteora_core.adapters.stack.Stack`.

        Args:
            output: Output of the base layer (..., out).
            indices: Indices of the chosen adapters, int64 (..., k).
            weights: Their weights (..., k).
        """
        spread = weights.new_zeros(*indices.shape[:-1], len(self.ranks)).scatter_add(-1, indices, weights)
        if self.scale is not None:
            linear = output if self.bias is None else output - self.bias
            output = output + (linear * (spread @ self.scale.to(spread.dtype))).to(output.dtype)
        if self.shift is not None:
            output = output + (spread @ self.shift.to(spread.dtype)).to(output.dtype)
        return output

    def _adapters(self, dtype: torch.dtype) -> Adapters:
        """The adapters as the kernels take them."""
        gate: Tensor = self.gate
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if gate.dtype != dtype:
            gate = gate.to(dtype)
        if lora_A.dtype != dtype:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        return Adapters.of_layer(gate, lora_A, lora_B, self.scaling, self.offsets, self.max_rank)

    def extra_repr(self) -> str:
        return f"adapters={len(self.ranks)}, total_rank={sum(self.ranks)}, in={self.in_features}, out={self.out_features}"
