"""A linear layer with several adapters and any rule for their weights, in plain PyTorch, which all compared routers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.magnitudes import check_stack
from meteora_core.adapters.stack import Stack
from meteora_core.errors import AdapterError
from meteora_core.model.attach import computing_dtype, find_targets
from meteora_core.model.caches import bypassed
from meteora_core.model.linears import WrappedLinear
from meteora_core.model.tokens import is_routed_expert
from meteora_kernels.reference import routing_weights


class Choice:
    """The routing that all layers of a router share. Its tensors are changed in place, so that captured CUDA graphs see the change.

    Args:
        count: Number of adapters N.
        top_k: Number of adapters per token, for layers with scores.
        temperature: Routing temperature, by which scores are divided.
        device: Device of the tensors.

    Attributes:
        allowed: Whether each adapter may be chosen, bool (N,).
        fixed: Weight of each adapter in layers without scores, float32 (N,).
    """

    def __init__(self, count: int, top_k: int, temperature: float, device: torch.device) -> None:
        self.top_k, self.temperature = top_k, temperature
        self.allowed = torch.ones(count, dtype=torch.bool, device=device)
        self.fixed = torch.zeros(count, device=device)

    def allow(self, indices: Iterable[int]) -> None:
        """Allow only these adapters."""
        self.allowed.zero_()
        self.allowed[list(indices)] = True

    def fix(self, weights: Tensor) -> None:
        """Set the weights of layers without scores; float (N,)."""
        self.fixed.copy_(weights)

    def only(self, adapter: int) -> None:
        """Give one adapter the weight 1 in layers without scores, and the others 0."""
        self.fixed.zero_()
        self.fixed[adapter] = 1.0

    def weights(self, scores: Tensor) -> Tensor:
        """The softmax of the top-k scores of each token, divided by the routing temperature; 0 for the other adapters.

        Args:
            scores: float32 (..., N); -inf for adapters that cannot be chosen in this layer.

        Returns:
            float32 (..., N); each token's weights sum to 1, or are all 0 if no adapter can be chosen.
        """
        scores = scores.masked_fill(~self.allowed.to(scores.device), float("-inf"))
        best = scores.topk(min(self.top_k, scores.shape[-1]), -1)
        chosen = routing_weights(best.values, self.temperature).nan_to_num(0.0)
        return torch.zeros_like(scores).scatter(-1, best.indices, chosen)


Scorer = Callable[[Tensor, Tensor], Tensor]
"""A function from a layer's input (..., in) and its product with all A matrices (..., R) to scores, float32 (..., N)."""


class RoutedLinear(WrappedLinear):
    """``y = W x + sum_i w_i s_i B_i A_i x`` with weights ``w`` from scores of the token, or fixed for all tokens.

    Args:
        base_layer: The linear layer that is wrapped.
        stack: The adapters' weights.
        choice: The routing, which all layers share.
        scorer: The function that scores the adapters for each token; None means the fixed weights of ``choice``.
    """

    owners: Tensor
    scaling: Tensor

    def __init__(self, base_layer: nn.Module, stack: Stack, choice: Choice, scorer: Scorer | None) -> None:
        super().__init__()
        self.base_layer, self.choice, self.scorer = base_layer, choice, scorer
        self.A, self.B = nn.Parameter(stack.A, requires_grad=False), nn.Parameter(stack.B, requires_grad=False)
        self.register_buffer("owners", owners_of(stack).to(stack.A.device), persistent=False)
        self.register_buffer("scaling", stack.scaling.float().to(stack.A.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        output: Tensor = self.base_layer(x)
        projected = x.to(self.A.dtype) @ self.A.t()
        if self.scorer is None:
            weights = self.choice.fixed.to(x.device)
        else:
            weights = self.choice.weights(self.scorer(x, projected))
        spread = (weights * self.scaling)[..., self.owners]
        return output + ((projected * spread.to(projected.dtype)) @ self.B).to(output.dtype)


def owners_of(stack: Stack) -> Tensor:
    """The adapter of each row of a stack's A, int64 (R,)."""
    return torch.repeat_interleave(torch.arange(len(stack.ranks)), torch.tensor(stack.ranks))


def targeting(stack: Stack, device: torch.device) -> Tensor:
    """Whether each adapter targets the layer, bool (N,)."""
    return torch.tensor([rank > 0 for rank in stack.ranks], device=device)


Wrap = Callable[[str, nn.Module, Stack], nn.Module]
"""A function from the path of a linear layer, the layer, and its stack, which is on the layer's device and in its dtype, to the layer's replacement."""


def wrap_routed(choice: Choice, scorer: Callable[[str, Stack], Scorer | None]) -> Wrap:
    """A function for :func:`install` that makes a :class:`RoutedLinear`.

    Args:
        choice: The routing.
        scorer: Function that makes the scorer of a layer from its path and its stack.
    """
    return lambda path, module, stack: RoutedLinear(module, stack, choice, scorer(path, stack))


def install(model: nn.Module, bank: AdapterBank, wrap: Wrap) -> Callable[[], None]:
    """Wrap, in place, every linear layer that a bank targets.

    Args:
        model: The base model.
        bank: The adapters.
        wrap: Function that makes the replacement of a layer.

    Returns:
        A function that restores the base model.

    Raises:
        AdapterError: The adapters do not fit the model, or overflow in its dtype.
    """
    bank, _ = fit_to_base(bank, model)
    for path, stack in bank.modules.items():
        if stack.tables or stack.pending or stack.experts > 1:
            raise AdapterError(
                f"{path}: routers are compared on plain LoRA adapters of linear layers, without DoRA, biases and whole weights",
                hint="leave out adapters of other kinds, or evaluate them with --model meteora",
            )
    targets = find_targets(model, bank)
    if unused := bypassed(model, {path: module for path, module in targets.items() if not is_routed_expert(path)}):
        raise AdapterError(f"adapters of {unused[0]} would have no effect: this model never calls the module", hint="use adapters of other modules")
    layers: dict[str, nn.Module] = {}
    for path, module in targets.items():
        stack, dtype = bank.modules[path], computing_dtype(module, bank.modules[path])
        check_stack(path, stack, bank.names, dtype)
        device = next(module.parameters()).device
        moved = Stack(stack.A.to(device, dtype), stack.B.to(device, dtype), stack.ranks, stack.scaling)
        layers[path] = wrap(path, module, moved).eval()
    for path, layer in layers.items():
        _replace(model, path, layer)

    def remove() -> None:
        for path, module in targets.items():
            _replace(model, path, module)

    return remove


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
