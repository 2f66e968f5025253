"""Adapters of the experts of a mixture, whose weights are 3-D tensors: PEFT's ``target_parameters``.

transformers stores the weights of all experts in parameters such as ``gate_up_proj`` (experts, out, in) and describes the layout by attributes of their
module (``is_transposed``, ``has_bias``, ``has_gate``, …). :class:`MeteoraExperts` takes the place of the module and computes it with the same attributes.
Every adapted parameter has one gate for all experts, which reads the input of the expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.adapters.stack import Stack
from meteora_core.errors import AdapterError
from meteora_core.model.layer import MeteoraLinear
from meteora_core.model.observe import row_routes
from meteora_core.model.tokens import check_observable, forced_routes
from meteora_core.routing import Meteora
from meteora_kernels import Adapters, Routing, mix, route

_LAYOUT = ("is_transposed", "has_bias", "has_gate", "num_experts", "_apply_gate", "down_proj")


class ExpertsWeight(nn.Module):
    """A parameter with the weights of all experts, as the base layer of its adapters. The parameter stays with its module.

    Args:
        module: The module of the experts.
        name: Name of the parameter in the module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        vars(self)["module"], self.name = module, name  # not registered as a part of this one
        self.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The parameter (experts, out, in), or (experts, in, out) if it is transposed."""
        weight = getattr(vars(self)["module"], self.name)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> None:
        """None: no adapter depends on the biases of experts."""
        return

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter has the shape (experts, in, out)."""
        return bool(getattr(vars(self)["module"], "is_transposed", False))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of experts, and the numbers of input and output features."""
        count, first, second = self.weight.shape
        return (count, first, second) if self.is_transposed else (count, second, first)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameter."""
        yield self.weight  # type: ignore[misc]


def find_experts(model: nn.Module, path: str, stack: Stack) -> ExpertsWeight:
    """The parameter of experts that a stack targets.

    Raises:
        AdapterError: The model does not have it, or its experts do not have the layout that transformers documents for experts.
    """
    parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        module = nn.Module()
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor) or parameter.ndim != 3:
        raise AdapterError(
            f"the adapters target {path}, and {type(model).__name__} has no such tensor of experts", hint="the adapters were trained on another base model"
        )
    if missing := [each for each in _LAYOUT if not hasattr(module, each)]:
        raise AdapterError(
            f"the adapters target {path}, and {type(module).__name__} does not describe its layout ({missing[0]} is missing)",
            hint="use adapters that do not target the experts (attention and shared experts can be targets)",
        )
    target = ExpertsWeight(module, name)
    if target.sizes != (stack.experts, stack.in_features, stack.out_features):
        raise AdapterError(
            f"{path}: the adapters map {stack.in_features} to {stack.out_features} features in {stack.experts} experts, "
            f"the base layer {target.sizes[1]} to {target.sizes[2]} in {target.sizes[0]}",
            hint="the adapters were trained on another base model",
        )
    return target


class ExpertsLinear(MeteoraLinear):
    """The adapters and the gate of one parameter of experts. Every pair of an adapter and an expert is a LoRA of its own for the kernels.

    Args:
        target: The parameter.
        path: Name of the parameter in the model.
        gate: Gate weights (N, in).
        stack: The adapters' weights; their rows go through the experts.
        state: Routing state, which all layers of the model share.
    """

    pair_scaling: Tensor
    pair_offsets: Tensor

    def __init__(self, target: ExpertsWeight, path: str, gate: Tensor, stack: Stack, state: Meteora) -> None:
        super().__init__(target, path, gate, stack, state)
        self.experts = count = stack.experts
        sizes = torch.tensor([rank // count for rank in stack.ranks for _ in range(count)])
        self.max_rank = int(sizes.max())
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        offsets[1:] = sizes.cumsum(0)
        self.register_buffer("pair_offsets", offsets.to(gate.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Not used: :meth:`mixed` needs the experts of the tokens."""
        raise NotImplementedError(f"{self.path} is run by its mixture of experts, which calls mixed(x, output, experts)")

    def mixed(self, x: Tensor, output: Tensor, experts: Tensor) -> Tensor:
        """Add the mixture of adapters.

        Args:
            x: Input of the experts (tokens, in).
            output: Output of the experts (tokens, out).
            experts: The expert of every token, int64 (tokens,).
        """
        state, mode = self.state, self.state.mode
        if mode.recorder is not None or mode.gate_labels is not None:
            check_observable([self.path], "labelling or recording routes")
        if mode.forced is not None:
            indices, weights = forced_routes(self, state.on(mode.forced, x.device), x)
        elif mode.rows is not None:
            indices, weights, _ = row_routes(self, mode.rows, x, self._adapters(x.dtype))
        else:
            routing = state.routing_on(x.device)
            indices, weights = route(F.linear(x, self.gate.to(x.dtype)), routing.top_k, routing.temperature, routing.allowed)
        pairs = indices * self.experts + experts.unsqueeze(-1)
        number = len(self.ranks) * self.experts
        gate = self.gate.detach().to(x.dtype)[:1].expand(number, -1)  # not evaluated, because the routes are given
        scaling = self.scaling.repeat_interleave(self.experts)
        adapters = Adapters.of_layer(gate, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), scaling, self.pair_offsets, self.max_rank)
        backend = "reference" if state.backend == "reference" else "dense"
        result = mix(x, output, adapters, Routing(indices.shape[-1], indices=pairs, weights=weights), backend=backend)
        assert isinstance(result, Tensor)
        return result

    @property
    def stack(self) -> Stack:
        """The adapters' weights as they are now."""
        scaling = self.scaling.detach().cpu()
        return Stack(self.lora_A.detach(), self.lora_B.detach(), tuple(self.ranks), scaling, experts=self.experts)


class MeteoraExperts(nn.Module):
    """The experts of a mixture, some of whose parameters have adapters.

    Args:
        base_layer: The module of the experts; it is not changed.
        state: Routing state, which all layers of the model share.
    """

    def __init__(self, base_layer: nn.Module, state: Meteora) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        """Other attributes are those of the base layer; some models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts.

        Args:
            hidden_states: Input (tokens, hidden).
            top_k_index: The experts of every token, int64 (tokens, k).
            top_k_weights: Their weights (tokens, k).

        Returns:
            The weighted sum over the experts (tokens, hidden).
        """
        base: Any = self.base_layer
        if not self.state.mode.enabled:
            return base(hidden_states, top_k_index, top_k_weights)
        count = top_k_index.shape[-1]
        x, experts = hidden_states.repeat_interleave(count, dim=0), top_k_index.reshape(-1)
        absent = experts >= base.num_experts  # with expert parallelism, experts of other processes
        experts = experts.clamp(0, base.num_experts - 1)
        up = self._linear("gate_up_proj" if base.has_gate else "up_proj", x, experts)
        output = self._linear("down_proj", base._apply_gate(up) if base.has_gate else base.act_fn(up), experts)
        if getattr(base, "has_post_expert_norm", False):
            output = base.post_expert_norm(output)
        weights = top_k_weights.reshape(-1).masked_fill(absent, 0.0)
        return (output * weights.unsqueeze(-1)).view(len(hidden_states), count, -1).sum(dim=1).to(hidden_states.dtype)

    def _linear(self, name: str, x: Tensor, experts: Tensor) -> Tensor:
        """One linear layer of every token's expert, with its adapters."""
        base: Any = self.base_layer
        weight, bias = getattr(base, name), getattr(base, f"{name}_bias") if base.has_bias else None
        output = x.new_empty(len(x), weight.shape[2 if base.is_transposed else 1])
        for expert in torch.unique(experts).tolist():
            chosen = experts == expert
            own = weight[expert].t() if base.is_transposed else weight[expert]
            output[chosen] = F.linear(x[chosen], own, None if bias is None else bias[expert])
        layer = self._modules.get(name)
        return layer.mixed(x, output, experts) if isinstance(layer, ExpertsLinear) else output
