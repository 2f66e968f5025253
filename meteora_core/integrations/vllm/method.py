"""The linear method "meteora": the method that a layer has without adapters, plus the adapters of its members."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod, register_weight_loader_v2_supported_method

from meteora_core.integrations.vllm import operators
from meteora_core.integrations.vllm.eight_bits import EightBitBase, base_of, kernel_of, quantised
from meteora_core.integrations.vllm.layout import Block, Shape, buffers, copies_up, weights_of
from meteora_core.integrations.vllm.runtime import RUNTIME
from meteora_core.integrations.vllm.served import Served
from meteora_core.integrations.vllm.slices import Slices


class MeteoraMethodV1(LinearMethodBase):
    """Wraps the linear method that a layer would have without adapters.

    On a GPU, one operator computes the base layer and the adapters. Unquantised base weights share a block of memory with the gates and A for that, 8-bit
    floating-point weights keep their memory, and for others the operator calls the wrapped method. Elsewhere, and in row-parallel layers, the wrapped method
    computes the base layer, and an operator adds the adapters to its output.

    Args:
        config: The configuration.
        under: The wrapped method.
        members: For every part of the layer's output, the path of the layer in the checkpoint; None for parts without adapters.
    """

    def __init__(self, config: Served, under: LinearMethodBase, members: Sequence[str | None]) -> None:
        self.config, self.under, self.members = config, under, tuple(members)
        self.uses_meta_device = bool(getattr(under, "uses_meta_device", False))
        self.requires_device_loading = True
        self.block: Block | None = None
        self.fused = False
        self.at_once = False
        self.kernel: Any = None
        self.eight: EightBitBase | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "under" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.under, name)

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Create the base weights. The arguments are those of the wrapped method."""
        names = ("input_size_per_partition", "output_partition_sizes", "input_size", "output_size", "params_dtype")
        given = dict(zip(names, sizes, strict=False)) | attributes
        self.under.create_weights(layer, *sizes, **attributes)
        layer.requires_unquantized_input = True  # vLLM would join the quantisation of some inputs to the operation before the layer
        widths = list(given["output_partition_sizes"])
        if len(self.members) not in (1, len(widths)):
            raise ValueError(f"the layer of {self.members} computes {len(widths)} outputs, and the checkpoint has adapters for {len(self.members)}")
        if given["params_dtype"] is torch.float32:
            exact_attention()
        self.hidden, self.parts, self.dtype = int(given["input_size_per_partition"]), widths, given["params_dtype"]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fill the block of gates and adapters, and of the base weights if they are computed together."""
        self.config.check_complete()
        store, slices = self.config.store, Slices.of(layer, self.parts)
        widths = self.parts if len(self.members) > 1 else [sum(self.parts)]
        shape = Shape.of(store, self.members, widths)
        fused = self._can_fuse(layer, shape, slices)
        if not fused:
            self.under.process_weights_after_loading(layer)
        like = torch.empty(0, dtype=self.dtype, device=layer.weight.device if fused else device_of(layer))
        if self.block is None:  # captured graphs contain the addresses of the first loading, so later ones reuse its memory
            wide = fused and copies_up(shape, self.hidden, like, widest=self.config.widest, top_k=self.config.default.top_k)
            self.block = Block(shape, self.hidden, like, base=fused, wide=wide)
        block = self.block
        block.fill(store, slices)
        if fused:
            weights_of(block).copy_(layer.weight.data)
            layer.weight.data = weights_of(block)
        buffers(layer, block.tensors())
        layer.meteora_outputs = sum(widths)
        self.at_once = not fused and not slices.sums and operators.has_kernels(block.rows.device, block.rows.dtype, self.config, len(widths))
        self.kernel = kernel_of(self.under, layer) if self.at_once else None
        base = partial(self.under.apply, layer) if self.at_once and self.kernel is None else None
        if self.kernel is not None:
            if self.eight is None:
                self.eight = base_of(self.kernel, layer, block.adapters)
            self.eight.load_again(layer)
            buffers(layer, {"meteora_flags": self.eight.linears.flags})
        operators.register_layer(block, slices.sums, self.config, base=base, eight=self.eight)
        if RUNTIME.table is not None:
            buffers(layer, {"meteora_options": RUNTIME.table})
        self.fused = fused

    def _can_fuse(self, layer: Any, shape: Shape, slices: Slices) -> bool:
        weight = getattr(layer, "weight", None)
        if type(self.under) is not UnquantizedLinearMethod or not isinstance(weight, Tensor) or weight.dtype != self.dtype:
            return False
        return not slices.sums and operators.has_kernels(weight.device, weight.dtype, self.config, len(shape.widths))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output (..., O) for x (..., h), base and adapters together."""
        flat = x.reshape(-1, x.shape[-1])
        if self.fused:
            y = torch.ops.meteora_vllm.group(flat, layer.meteora_rows, layer.meteora_outputs)
            y = y if bias is None else y + bias
        elif self.kernel is not None:
            x8, x_scale = quantised(self.kernel, layer, flat)
            y = torch.ops.meteora_vllm.eight(flat, x8, x_scale, layer.meteora_rows, layer.meteora_outputs)
            y = y if bias is None else y + bias
        elif self.at_once:
            y = torch.ops.meteora_vllm.over(flat, bias, layer.meteora_rows, layer.meteora_outputs)
        else:
            y = self.under.apply(layer, x, bias)
            y = torch.ops.meteora_vllm.add(flat, y.reshape(-1, y.shape[-1]), layer.meteora_rows)
        return y.view(*x.shape[:-1], y.shape[-1])


@register_weight_loader_v2_supported_method
class MeteoraMethod(MeteoraMethodV1):
    """:class:`MeteoraMethodV1` for layers whose weights vLLM loads by their parameters (its loader checks the name of the class)."""


def method_for(config: Served, under: LinearMethodBase, members: Sequence[str | None]) -> MeteoraMethodV1:
    """The method of a layer with adapters."""
    modern = type(under).__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED
    return (MeteoraMethod if modern else MeteoraMethodV1)(config, under, members)


def exact_attention() -> None:
    """Make Triton multiply float32 exactly, unless ``TRITON_F32_DEFAULT`` is set: vLLM's attention for float32 would round to TF32, and rounded inputs choose
    other adapters. Triton reads the variable when it compiles."""
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def device_of(layer: torch.nn.Module) -> torch.device:
    """The device of a layer's weights."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    from vllm.platforms import current_platform

    return torch.device(current_platform.device_type)
