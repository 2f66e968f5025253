"""Replaces norms and gated activations directly before a fused group by modules that write their output into the memory that the group reads.

In prefill, a fused group multiplies ``[x, h]`` by ``[W, B^T]``, so x would have to be copied into wider rows (:class:`meteora_core.fused.group.Inputs`).
:func:`feed` therefore replaces the module that computes x by a :class:`Feeder`, which computes x and writes it into such rows with one kernel. A module
is only replaced if it has a known form and its ``forward`` gives the same numbers as the kernel on random input, up to rounding. In calls in which the
group would not run as one, a feeder calls the module's ``forward``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.fused.group import FusedGroup
from meteora_core.model.layer import MeteoraLinear

NORMS: tuple[tuple[str, str, str], ...] = (("input_layernorm", "self_attn", "q_proj"), ("post_attention_layernorm", "mlp", "gate_proj"))
"""In a decoder layer: a norm, the module that receives its output, and the first linear layer that this module calls with it."""
_OTHER_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Norms of decoder layers in which the order of :data:`NORMS` does not hold; these layers are left out."""


class Feeder(nn.Module):
    """Replaces a module whose output a fused group reads; it has the same parameters, buffers, children and hooks.

    If the group runs as one, :meth:`write` computes the output, otherwise the module's ``forward``. Copies and pickles of a feeder are copies and pickles
    of the module.

    Args:
        own: The module that is replaced.
        group: The group that reads the output.
    """

    own: nn.Module
    group: FusedGroup

    def __init__(self, own: nn.Module, group: FusedGroup) -> None:
        super().__init__()
        vars(self).update(vars(own), own=own, group=group)  # shares the module's dictionaries of parameters, children and hooks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output of the module. Arguments and result are those of the module's ``forward``."""
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and type(args[0]) is Tensor and self.group.usable(args[0]):
            output = self.write(args[0])
            if output is not None:
                return output
        return self.own.forward(*args, **kwargs)

    def write(self, x: Tensor) -> Tensor | None:
        """The module's output for ``x`` (..., features), from a kernel that writes the group's input; None if the kernel cannot compute it."""
        raise NotImplementedError

    @classmethod
    def imitates(cls, module: nn.Module, group: FusedGroup) -> bool:
        """Whether :meth:`write` of a feeder for this module gives the same output as the module, up to rounding, on random input."""
        raise NotImplementedError

    def itself(self) -> nn.Module:
        """The module, with the attributes that were set on the feeder."""
        vars(self.own).update({name: value for name, value in vars(self).items() if name not in ("own", "group")})
        return self.own

    def extra_repr(self) -> str:
        return f"replaces {type(self.own).__name__}"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.itself(), memo)

    def __reduce__(self) -> tuple[Callable[[nn.Module], nn.Module], tuple[nn.Module]]:
        return _unchanged, (self.itself(),)


class NormFeeder(Feeder):
    """A feeder for an RMS norm."""

    def write(self, x: Tensor) -> Tensor | None:
        return _norm(self, self.group, x)

    @classmethod
    def imitates(cls, module: nn.Module, group: FusedGroup) -> bool:
        """Compares the outputs for large, small and tiny rows; for tiny rows they depend on epsilon."""
        from meteora_kernels.feed.rms_norm import MOST_COLUMNS

        weight = getattr(module, "weight", None)
        hidden = group.layout.group.packed.shape[1]
        if not isinstance(weight, Tensor) or weight.shape != (hidden,) or hidden > MOST_COLUMNS or len(list(module.parameters())) != 1:
            return False
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, hidden, generator=generator) * torch.tensor([1.0, 30.0, 1e-2, 1e-3])[:, None]
        return _agree(module.forward, lambda x: _norm(module, group, x), x.to(weight.device, weight.dtype))


class GatedFeeder(Feeder):
    """A feeder for a gated MLP, ``down(silu(gate(x)) * up(x))``. The group of the last linear layer reads the product."""

    def write(self, x: Tensor) -> Tensor | None:
        product = _product(self.gate_proj(x), self.up_proj(x), self.group)  # type: ignore[operator]
        output = self.down_proj(product)  # type: ignore[operator]
        assert isinstance(output, Tensor)
        return output

    @classmethod
    def imitates(cls, module: nn.Module, group: FusedGroup) -> bool:
        """Compares the module's ``forward`` with the kernel, with substitutes for its linear layers."""
        packed = group.layout.group.packed
        x = torch.randn(1, 4, 2 * 64, generator=torch.Generator().manual_seed(0)) * 3
        own: Any = type(module).forward
        linears = [child for child in module.children() if isinstance(child, MeteoraLinear)]
        if len(linears) != 3 or any(child._forward_hooks or child._forward_pre_hooks for child in module.children() if child not in linears):
            return False
        return _agree(lambda x: own(_Halves(module), x), lambda x: _product(x[..., :64], x[..., 64:], group), x.to(packed.device, packed.dtype))


def feed(model: nn.Module) -> int:
    """Replace norms and gated activations before fused groups by feeders. Returns the number of replaced modules."""
    replaced = 0
    with torch.inference_mode(False), torch.no_grad():
        for parent, name, kind, linear in list(_candidates(model)):
            module, group = getattr(parent, name), linear.group
            if isinstance(module, Feeder) or "forward" in vars(module) or not isinstance(group, FusedGroup):
                continue
            if kind.imitates(module, group):
                setattr(parent, name, kind(module, group))
                replaced += 1
    return replaced


def release(model: nn.Module) -> None:
    """Undo :func:`feed`: put the replaced modules back."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Feeder):
                setattr(parent, name, module.itself())


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, str, type[Feeder], MeteoraLinear]]:
    """Modules that can feed a group: parent, name in the parent, class of the feeder, and the first linear layer that receives their output."""
    for parent in model.modules():
        children = dict(parent.named_children())
        if not any(name in children for name in _OTHER_NORMS):
            for name, user, first in NORMS:
                linear = getattr(children.get(user), first, None)
                if name in children and isinstance(linear, MeteoraLinear):
                    yield parent, name, NormFeeder, linear
        for name, child in children.items():
            parts = dict(child.named_children())
            down = parts.get("down_proj")
            if isinstance(down, MeteoraLinear) and all(part in parts for part in ("gate_proj", "up_proj", "act_fn")):
                yield parent, name, GatedFeeder, down


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def _norm(module: nn.Module, group: FusedGroup, x: Tensor) -> Tensor | None:
    from meteora_kernels.feed.rms_norm import rms_norm

    weight, epsilon = module.weight, getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or not isinstance(weight, Tensor):
        return None
    if weight.dtype != x.dtype or weight.device != x.device or weight.shape != x.shape[-1:]:
        return None
    out = group.inputs.new(x.shape, x)
    rms_norm(_evenly(x), weight, epsilon, out)
    return out


def _product(gate: Tensor, up: Tensor, group: FusedGroup) -> Tensor:
    from meteora_kernels.feed.silu_mul import silu_mul

    out = group.inputs.new(gate.shape, gate)
    gate, up = _evenly(gate), _evenly(up)
    silu_mul(gate, up, out)
    return out


def _evenly(x: Tensor) -> Tensor:
    """``x`` (..., h) with contiguous columns and all rows at the same distance; a copy if it is not so."""
    if x.is_contiguous() or (x.stride(-1) == 1 and (x.dim() == 2 or (x.dim() == 3 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))))):
        return x
    return x.contiguous()


class _Halves:
    """A substitute for a gated MLP: its first linear layer returns the first half of x, its second layer the other half, its third layer its input."""

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


def _agree(own: Callable[[Tensor], Any], ours: Callable[[Tensor], Tensor | None], x: Tensor) -> bool:
    """Whether two functions give the same tensor for ``x``, up to rounding."""
    try:
        expected, actual = own(x), ours(x)
    except Exception:  # the module has another form, so it is not replaced
        return False
    if type(expected) is not Tensor or actual is None or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    close = max(3 * torch.finfo(x.dtype).eps, 1e-5)
    return torch.allclose(actual, expected, rtol=close, atol=1e-7)
