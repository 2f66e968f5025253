"""Modules right before fused linears: norms and gated activations that write their output where the fused product reads it.

A fused group multiplies ``[x, h]`` by ``[W, B^T]`` for prefill, and x would have to be copied into the wider rows (:mod:`meteora_kernels.wide`).
So :func:`feed` gives the module that makes x one kernel that writes it there. A module takes part only if it is of a known form and its own
forward gives the same numbers, up to rounding, on random input; in each call it runs its own forward wherever the group would not run as one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.model.layer import MeteoraLinear
from meteora_kernels.operators import on_device_of

if TYPE_CHECKING:
    from meteora_core.model.fuse import FusedGroup

NORMS: tuple[tuple[str, str, str], ...] = (("input_layernorm", "self_attn", "q_proj"), ("post_attention_layernorm", "mlp", "gate_proj"))
"""In a decoder layer: a norm, the module that gets its output, and the first linear that this calls with it."""
_OTHERS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Decoder layers with these put their norms elsewhere."""


class Feeder:
    """The forward of a module, in its place; a copy of the module gets its own forward back.

    Attributes:
        module: Whose forward it is.
        group: The group that reads the output.
        compute: Does it on the module's tensor arguments, or returns None where it cannot.
    """

    def __init__(self, module: nn.Module, group: FusedGroup, compute: Callable[[nn.Module, FusedGroup, Tensor], Tensor | None]) -> None:
        self.module = module
        self.group = group
        self.compute = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and type(args[0]) is Tensor and self.group.usable(args[0]):
            output = self.compute(self.module, self.group, args[0])
            if output is not None:
                return output
        return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = memo.get(id(self.module), self.module)
        return types.MethodType(type(module).forward, module)


def feed(model: nn.Module, groups: Mapping[MeteoraLinear, FusedGroup]) -> int:
    """Let norms and gated activations before these groups write where the groups read. Returns how many modules take part."""
    taken = 0
    with torch.inference_mode(False), torch.no_grad():
        for module, linear, compute, same in _candidates(model):
            group = groups.get(linear)
            own = vars(module).get("forward")
            if group is None or (own is not None and getattr(own, "__func__", None) is not type(module).forward):
                continue
            if same(module, group):
                module.forward = Feeder(module, group, compute)
                taken += 1
    return taken


def starve(model: nn.Module) -> None:
    """Undo :func:`feed`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Feeder):
            del module.forward


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, MeteoraLinear, Any, Any]]:
    """A module, the first linear that gets its output, how to compute it, and whether that is the same."""
    for parent in model.modules():
        children = dict(parent.named_children())
        if not any(name in children for name in _OTHERS):
            for name, user, first in NORMS:
                linear = getattr(children.get(user), first, None)
                if name in children and isinstance(linear, MeteoraLinear):
                    yield children[name], linear, _norm, _same_norm
        down = children.get("down_proj")
        if isinstance(down, MeteoraLinear) and all(name in children for name in ("gate_proj", "up_proj", "act_fn")):
            yield parent, down, _gated, _same_gated


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _norm(module: nn.Module, group: FusedGroup, x: Tensor) -> Tensor | None:
    from meteora_kernels.feed.rms_norm import rms_norm

    weight, epsilon = module.weight, _epsilon(module)
    if not isinstance(weight, Tensor) or epsilon is None or weight.dtype != x.dtype or weight.device != x.device or weight.shape != x.shape[-1:]:
        return None
    out = group.new_input(x.shape, x)
    flat = x.reshape(-1, x.shape[-1])
    with on_device_of(x):
        rms_norm(flat if flat.stride(1) == 1 else flat.contiguous(), weight, epsilon, out.view(-1, x.shape[-1]))
    return out


def _same_norm(module: nn.Module, group: FusedGroup) -> bool:
    """Whether this is the norm of :mod:`meteora_kernels.feed.rms_norm`: large, small and tiny rows, on which epsilon decides."""
    from meteora_kernels.feed.rms_norm import MOST_COLUMNS

    weight = getattr(module, "weight", None)
    hidden = group.wide.hidden
    if not isinstance(weight, Tensor) or weight.shape != (hidden,) or hidden > MOST_COLUMNS or len(list(module.parameters())) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, hidden, generator=generator) * torch.tensor([1.0, 30.0, 1e-2, 1e-3])[:, None]
    return _agree(lambda x: type(module).forward(module, x), lambda x: _norm(module, group, x), x.to(weight.device, weight.dtype))


def _gated(module: nn.Module, group: FusedGroup, x: Tensor) -> Tensor | None:
    return module.down_proj(_product(module.gate_proj(x), module.up_proj(x), group))  # type: ignore[operator]


def _product(gate: Tensor, up: Tensor, group: FusedGroup) -> Tensor:
    from meteora_kernels.feed.silu_mul import silu_mul

    out = group.new_input(gate.shape, gate)
    width = gate.shape[-1]
    with on_device_of(gate):
        silu_mul(gate.reshape(-1, width), up.reshape(-1, width), out.view(-1, width))
    return out


class _Halves:
    """Stands in for a gated MLP: its first linear gives the first half of x, its second the other, its third what it gets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def gate_proj(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[0]

    def up_proj(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[1]

    def down_proj(self, x: Tensor) -> Tensor:
        return x


def _same_gated(module: nn.Module, group: FusedGroup) -> bool:
    """Whether this is ``down(silu(gate(x)) * up(x))``, by its own forward around stand-ins of the linears."""
    like = group.packed
    x = torch.randn(1, 4, 2 * 64, generator=torch.Generator().manual_seed(0)) * 3
    own: Any = type(module).forward
    linears = [child for child in module.children() if isinstance(child, MeteoraLinear)]
    if len(linears) != 3 or any(child._forward_hooks or child._forward_pre_hooks for child in module.children() if child not in linears):
        return False
    return _agree(lambda x: own(_Halves(module), x), lambda x: _product(x[..., :64], x[..., 64:], group), x.to(like.device, like.dtype))


def _agree(own: Callable[[Tensor], Any], ours: Callable[[Tensor], Tensor | None], x: Tensor) -> bool:
    try:
        expected, found = own(x), ours(x)
    except Exception:  # another form: the module stays as it is
        return False
    if type(expected) is not Tensor or found is None or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    close = max(3 * torch.finfo(x.dtype).eps, 1e-5)
    return torch.allclose(found, expected, rtol=close, atol=1e-7)
