"""Faster inference on a GPU: linears that share their input (q, k, v; gate, up) run as one, base and adapters together.

:func:`fuse` moves the weights of such a group into one block of memory and makes the parameters views of it, so that no weight is stored
twice and a checkpoint that is loaded into the model later is seen at once. While gradients are wanted, routes are forced, labelled or recorded,
or another backend is asked for, the layers run as they did before.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.model.feeders import feed, starve
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import routing_state
from meteora_kernels import pick_backend, plan
from meteora_kernels.operators import eager, on_device_of

_log = logging.getLogger(__name__)

GROUPS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of siblings that are called with the same input, in this order."""

_PATIENCE = 4
"""After so many calls in which the members' inputs differed, a group stops running as one."""


_told: list[bool] = []
"""Not empty once it was said that fused layers cannot run."""


class FusedGroup:
    """One to three layers whose weights lie in one block.

    Attributes:
        layers: The members, in the order in which their model calls them.
        packed: (P, h): all base weights, then per member its gate and A with padding.
        up: All B, flat.
        wide: Where B^T and the input lie for prefill.
        beside: Whether B^T lies beside the weights too, as a copy of ``up`` that :meth:`refresh` keeps up to date.
    """

    def __init__(self, layers: list[MeteoraLinear]) -> None:
        from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
        from meteora_kernels.types import Adapters, Group
        from meteora_kernels.wide import Wide

        self.layers = layers
        first = layers[0]
        self.state = first.state
        self.widths = [layer.out_features for layer in layers]
        self.rank = sum(first.ranks)
        self.max_rank = max(first.ranks)
        self.gate_rows = gate_rows_of(len(first.ranks))
        stacked = stacked_rows_of(len(first.ranks), self.rank)
        outputs = sum(self.widths)
        weight = first.weight
        self.wide = Wide(first.in_features, self.rank, len(layers))
        seen = not any(layer.lora_B.is_inference() for layer in layers)  # inference tensors do not tell that they changed
        self.beside = seen and self.wide.pays(weight.dtype)
        with torch.inference_mode(False), torch.no_grad():
            rows = -(-(outputs + len(layers) * stacked) // 128) * 128
            self.packed: Tensor = self.wide.new_block(rows, weight) if self.beside else weight.new_zeros(rows, first.in_features)
            self.up: Tensor = torch.empty(self.rank * outputs, dtype=weight.dtype, device=weight.device)
            biases = [layer.bias for layer in layers]
            self.bias: Tensor | None = None
            if any(bias is not None for bias in biases):
                self.bias = torch.zeros(outputs, dtype=weight.dtype, device=weight.device)
                for bias, place in zip(biases, torch.split(self.bias, self.widths), strict=True):
                    if bias is not None:
                        _move(bias, place)
            start, extra, before = 0, outputs, 0
            for layer, width in zip(layers, self.widths, strict=True):
                if _rows_close not in layer._state_dict_hooks.values():
                    layer.register_state_dict_post_hook(_rows_close)  # type: ignore[no-untyped-call]
                place = self.packed[start : start + width]
                _move(layer.weight, place)
                _move(layer.gate, self.packed[extra : extra + len(layer.ranks)])
                _move(layer.lora_A, self.packed[extra + self.gate_rows : extra + self.gate_rows + self.rank])
                _move(layer.lora_B, self.up[before : before + self.rank * width].view(self.rank, width))
                start, extra, before = start + width, extra + stacked, before + self.rank * width
        adapters = Adapters.of_group(self.packed, self.up, first.scaling, first.offsets, tuple(self.widths), self.max_rank)
        self.group = Group.of(self.packed, adapters, self.bias, has_up=self.beside)
        self.placed = [
            (holder._parameters, name, parameter, parameter.data_ptr())
            for layer in layers
            for holder, name, parameter in (
                (layer.base_layer, "weight", layer.weight),
                (layer, "gate", layer.gate),
                (layer, "lora_A", layer.lora_A),
                (layer, "lora_B", layer.lora_B),
                (layer.base_layer, "bias", layer.bias),
            )
            if parameter is not None
        ]
        self.versions: list[int] = []
        self.handed: weakref.ref[Tensor] | None = None
        self.seen: Tensor | None = None
        self.version = (0, 0)
        self.waiting: list[Tensor | None] = [None] * len(layers)
        self.misses = 0

    def usable(self, x: Tensor) -> bool:
        """Whether this call may run as one."""
        state, layer = self.state, self.layers[0]
        if not state.enabled or state.observed or state.backend not in ("auto", "triton") or self.misses > _PATIENCE:
            return False
        if torch.is_grad_enabled() or (layer.dropout and layer.training) or x.dtype != self.packed.dtype or x.device != self.packed.device:
            return False
        if torch.is_autocast_enabled(x.device.type) or x.numel() == 0:
            return False
        return torch.compiler.is_compiling() or self.in_place()

    def in_place(self) -> bool:
        """Whether every weight still lies in the block, so that the block holds what the layers would use."""
        return all(holder[name] is parameter and parameter.data_ptr() == place for holder, name, parameter, place in self.placed)

    def refresh(self) -> None:
        """Copy B beside the weights again where it changed."""
        versions = [layer.lora_B._version for layer in self.layers]
        if self.beside and versions != self.versions:
            with torch.no_grad():
                self.wide.place_up(self.packed, self.up, self.widths)
            self.versions = versions

    def new_input(self, shape: torch.Size, like: Tensor) -> Tensor:
        """An unwritten tensor for this group's next input, (..., h): where the plan wants it, with columns around it that :meth:`run` uses."""
        from meteora_kernels.group import reads_in_place

        tokens = shape[:-1].numel()
        if reads_in_place(self.group, tokens, self.state.top_k):
            rows = self.wide.new_rows(tokens, like).view(shape)
            self.handed = weakref.ref(rows)
            return rows
        return like.new_empty(shape)

    def is_handed(self, x: Tensor) -> bool:
        """Whether (M, h) ``x`` is what :meth:`new_input` gave last, or a view of all of it: while that lives, nothing else lies at its address."""
        handed = None if self.handed is None else self.handed()
        return handed is not None and x.data_ptr() == handed.data_ptr() and x.numel() == handed.numel() and x.stride() == (self.wide.row, 1)

    def run(self, index: int, x: Tensor) -> Tensor:
        """The output of member ``index``; the first member that meets a new ``x`` computes all."""
        if torch.compiler.is_compiling():
            return self._run(index, x, (0, 0)) if self.usable(x) else MeteoraLinear.forward(self.layers[index], x)
        version = (self.state.version, 0 if x.is_inference() else x._version)
        if self.seen is x and self.version == version and self.waiting[index] is not None and not torch.is_grad_enabled():
            return self._take(index)
        if not self.usable(x):
            return MeteoraLinear.forward(self.layers[index], x)
        try:
            return self._run(index, x, version)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            # A kernel that cannot be built here (shared memory, no compiler): the layers run apart from now on.
            self._give_up(error)
            return MeteoraLinear.forward(self.layers[index], x)

    def _run(self, index: int, x: Tensor, version: tuple[int, int]) -> Tensor:
        if len(self.layers) == 1:
            return self._compute(x)[0]
        if self.seen is not x or self.version != version or self.waiting[index] is None:
            if any(output is not None for output in self.waiting):
                self.misses += 1
            self.seen, self.version = x, version
            self.waiting = list(self._compute(x))
        return self._take(index)

    def _take(self, index: int) -> Tensor:
        found = self.waiting[index]
        assert found is not None
        self.waiting[index] = None
        if all(output is None for output in self.waiting):
            self.seen = None
        return found

    def _give_up(self, error: Exception) -> None:
        self.misses = _PATIENCE + 1
        self.seen, self.waiting = None, [None] * len(self.layers)
        if not _told:
            _told.append(True)
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            _log.warning("fused layers cannot run on %s (%s); the layers run apart", self.packed.device, text)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        from meteora_kernels import Routing, group

        flat = x.reshape(-1, x.shape[-1])
        routing = Routing(self.state.top_k, self.state.temperature, self.layers[0]._allowed())
        with on_device_of(x):
            in_place = False
            if eager(x):
                self.refresh()
                in_place = self.beside and self.is_handed(flat)
            output = group.run_group(flat if in_place else flat.contiguous(), self.group, routing, in_place=in_place)
        return torch.split(output.view(*x.shape[:-1], -1), self.widths, dim=-1)


def fuse(model: nn.Module) -> int:
    """Run linears that share an input as one, in place; for inference on a CUDA GPU. Logits stay the same up to rounding.

    Norms and gated activations right before such linears run as one kernel each (:mod:`meteora_core.model.feeders`).
    Layers that cannot take part (quantised bases, adapters of rank 0 only) stay as they are; calling it twice is harmless.

    Args:
        model: A model with adapters attached.

    Returns:
        How many groups were made.

    Raises:
        UsageError: Nothing is attached, or the GPU kernels cannot run where the model is.

    Example:
        >>> from meteora_core import fuse, load_checkpoint
        >>> model = load_checkpoint("runs/mine", device="cuda")  # doctest: +SKIP
        >>> fuse(model)  # doctest: +SKIP
        60
    """
    routing_state(model)
    made: dict[MeteoraLinear, FusedGroup] = {}
    count = 0
    for layers in list(_groups(model)):
        reason = plan.why_not_triton(layers[0].weight.device.type, layers[0].weight.dtype)
        if reason is not None:
            raise UsageError(f"this model cannot be fused: {reason}", hint="fusing speeds up inference on a CUDA GPU; without it the model runs as it is")
        group = FusedGroup(layers)
        for index, layer in enumerate(layers):
            layer.forward = _Member(group, index)  # type: ignore[method-assign]
            made[layer] = group
        count += 1
    replaced = feed(model, made)
    _log.debug("fused %d groups; %d modules before them write where they read", count, replaced)
    return count


def fuse_for_inference(model: nn.Module, mode: Literal["auto", "on", "off"] = "auto") -> int:
    """:func:`fuse` where it pays.

    Args:
        model: A model with adapters attached.
        mode: "on" fuses or raises; "off" does nothing; "auto" fuses on a CUDA GPU whose kernels the model's backend would use anyway.

    Returns:
        How many groups were made.

    Raises:
        UsageError: Nothing is attached; or, with "on", the model cannot be fused.
    """
    state = routing_state(model)
    if mode not in ("auto", "on", "off"):
        raise UsageError(f"unknown way to fuse: {mode!r}", hint="choose from: auto, on, off")
    if mode == "off":
        return 0
    if mode == "auto":
        layers = next(_groups(model), None)
        if layers is None or layers[0].weight.device.type != "cuda" or state.backend not in ("auto", "triton"):
            return 0
        layer = layers[0]
        probe = layer.weight.new_empty(1, layer.in_features)
        if pick_backend(probe, len(layer.ranks), sum(layer.ranks), state.top_k, training=False)[0] != "triton":
            return 0
    return fuse(model)


def unfuse(model: nn.Module) -> int:
    """Undo :func:`fuse`: every weight gets its own memory again. Returns how many layers were released.

    Example:
        >>> from meteora_core import fuse, load_checkpoint, unfuse
        >>> model = load_checkpoint("runs/mine", device="cuda")  # doctest: +SKIP
        >>> fuse(model), unfuse(model)  # doctest: +SKIP
        (60, 150)
    """
    routing_state(model)
    released = 0
    starve(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MeteoraLinear) and _is_member(module):
                del module.forward
                for parameter in (module.weight, module.gate, module.lora_A, module.lora_B, *([] if module.bias is None else [module.bias])):
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
                released += 1
    return released


def is_fused(model: nn.Module) -> bool:
    """Whether any layer of the model runs as part of a fused group."""
    return any(isinstance(module, MeteoraLinear) and _is_member(module) for module in model.modules())


class _Member:
    """The forward of a layer that runs as part of a group."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.run(self.index, x)


def _is_member(layer: MeteoraLinear) -> bool:
    return isinstance(vars(layer).get("forward"), _Member)


def _rows_close(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Of weights whose rows lie apart a state dict has copies whose rows lie close: who saves them (``save_pretrained``) takes no others."""
    for name, parameter in layer.named_parameters():
        tensor = state.get(prefix + name)
        if tensor is not None and tensor is not parameter and not tensor.is_contiguous():
            state[prefix + name] = tensor.contiguous()


def _move(parameter: Tensor, place: Tensor) -> None:
    place.copy_(parameter.detach())
    parameter.data = place


def _groups(model: nn.Module) -> Iterator[list[MeteoraLinear]]:
    """Layers to fuse: siblings of :data:`GROUPS` with equal ranks and scaling together, all others alone."""
    for parent in model.modules():
        left = {name: child for name, child in parent.named_children() if isinstance(child, MeteoraLinear) and _can_fuse(child)}
        for names in GROUPS:
            siblings = [left[name] for name in names if name in left]
            if len(siblings) == len(names) and all(_alike(siblings[0], sibling) for sibling in siblings[1:]):
                yield siblings
                for name in names:
                    del left[name]
        for child in left.values():
            yield [child]


def _can_fuse(layer: MeteoraLinear) -> bool:
    base = layer.base_layer
    plain = type(base) is nn.Linear and base.weight.is_floating_point() and not base.weight.is_meta
    return plain and sum(layer.ranks) > 0 and layer.gate.dtype == layer.lora_A.dtype == base.weight.dtype and "forward" not in vars(layer)


def _alike(one: MeteoraLinear, other: MeteoraLinear) -> bool:
    return (
        one.ranks == other.ranks
        and one.in_features == other.in_features
        and one.weight.dtype == other.weight.dtype
        and one.weight.device == other.weight.device
        and torch.equal(one.scaling, other.scaling)
    )
