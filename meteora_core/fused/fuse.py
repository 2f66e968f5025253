"""Fuses linear layers for inference on a GPU: layers with a common input (q, k, v; gate, up) run as one group, base weights and adapters together.

:func:`fuse` moves the weights of a group into one block of memory and makes the parameters views of this block. No weight is stored twice, and a
checkpoint that is loaded into the model later takes effect at once. A group is not used while gradients are enabled, while routes are forced, labelled
or recorded by :func:`meteora_core.record_routes`, or with a backend other than "auto" and "triton"; its layers then run separately. In packed batches, the
groups also take the options of every text, and report the routes (:class:`meteora_core.routing.routes.ChosenRecorder`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from meteora_core.errors import UsageError
from meteora_core.fused.feeders import feed, release
from meteora_core.fused.group import FusedGroup
from meteora_core.fused.layout import give_own_memory
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import meteora_of
from meteora_core.tensors import is_quantized
from meteora_kernels import pick_backend, plan

_log = logging.getLogger(__name__)

GROUPS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that are called with the same input, in this order."""


def fuse(model: nn.Module) -> int:
    """Fuse linear layers that share an input, in place, for inference on a CUDA GPU. Logits do not change, except by rounding.

    Each norm and gated activation directly before a group runs as one kernel (:mod:`meteora_core.fused.feeders`).
    Layers that cannot be fused (quantised base weights, only adapters of rank 0) are unchanged. A second call has no effect.

    Args:
        model: A model with adapters attached.

    Returns:
        The number of groups that were created.

    Raises:
        UsageError: The model has no adapters attached, or the GPU kernels cannot run on its device or with its dtype.

    Example:
        >>> from meteora_core import fuse, load_checkpoint
        >>> model = load_checkpoint("runs/mine", device="cuda")  # doctest: +SKIP
        >>> fuse(model)  # doctest: +SKIP
        60
    """
    meteora_of(model)
    count = 0
    for layers in list(_groups(model)):
        reason = plan.why_not_triton(layers[0].weight.device.type, layers[0].weight.dtype)
        if reason is not None:
            raise UsageError(f"this model cannot be fused: {reason}", hint="fusing only speeds up inference on a CUDA GPU; leave it out on this device")
        group = FusedGroup(layers)
        for index, layer in enumerate(layers):
            layer.join(group, index)
        count += 1
    _log.debug("fused %d groups; %d modules before them write directly into the groups' inputs", count, feed(model))
    return count


def fuse_for_inference(model: nn.Module, mode: Literal["auto", "on", "off"] = "auto") -> int:
    """Call :func:`fuse` if the model benefits from it.

    Args:
        model: A model with adapters attached.
        mode: "on" fuses, or raises an error if that is impossible; "off" does nothing; "auto" fuses if the model is on a CUDA GPU and its backend would
            run the Triton kernels there.

    Returns:
        The number of groups that were created.

    Raises:
        UsageError: The model has no adapters attached, the mode is unknown, or the mode is "on" and the model cannot be fused.
    """
    state = meteora_of(model)
    if mode not in ("auto", "on", "off"):
        raise UsageError(f"unknown fusing mode {mode!r}", hint="choose from: auto, on, off")
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
    """Undo :func:`fuse` and give every weight separate memory again. Returns the number of layers that left a group.

    Example:
        >>> from meteora_core import fuse, load_checkpoint, unfuse
        >>> model = load_checkpoint("runs/mine", device="cuda")  # doctest: +SKIP
        >>> fuse(model), unfuse(model)  # doctest: +SKIP
        (60, 150)
    """
    meteora_of(model)
    release(model)
    fused = [module for module in model.modules() if isinstance(module, MeteoraLinear) and module.group is not None]
    for layer in fused:
        layer.leave()
        give_own_memory(layer)
    return len(fused)


def is_fused(model: nn.Module) -> bool:
    """Whether any layer of the model runs as part of a fused group."""
    return any(isinstance(module, MeteoraLinear) and module.group is not None for module in model.modules())


def _groups(model: nn.Module) -> Iterator[list[MeteoraLinear]]:
    """The groups of layers to fuse: layers of :data:`GROUPS` with equal ranks and scaling together, every other layer by itself."""
    for parent in model.modules():
        unfused = {name: child for name, child in parent.named_children() if isinstance(child, MeteoraLinear) and _can_fuse(child)}
        for names in GROUPS:
            siblings = [unfused[name] for name in names if name in unfused]
            if len(siblings) == len(names) and all(_alike(siblings[0], sibling) for sibling in siblings[1:]):
                yield siblings
                for name in names:
                    del unfused[name]
        for child in unfused.values():
            yield [child]


def _can_fuse(layer: MeteoraLinear) -> bool:
    """Whether a layer can join a group: a plain linear layer with plain LoRA of its dtype, in no group yet, whose ``forward`` was not replaced."""
    base = layer.base_layer
    plain = type(base) is nn.Linear and not is_quantized(base.weight) and not base.weight.is_meta and "forward" not in vars(layer)
    return plain and layer.is_plain and layer.group is None and sum(layer.ranks) > 0 and layer.gate.dtype == layer.lora_A.dtype == base.weight.dtype


def _alike(one: MeteoraLinear, other: MeteoraLinear) -> bool:
    return (
        one.ranks == other.ranks
        and one.in_features == other.in_features
        and one.weight.dtype == other.weight.dtype
        and one.weight.device == other.weight.device
        and torch.equal(one.scaling, other.scaling)
    )
