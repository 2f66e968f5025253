"""Layers over a base in 8-bit floating-point numbers, whose product and adapters are computed by one operator from an input that vLLM has quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meteora_kernels import Adapters
from meteora_kernels.group.eight_bits import EightBits


@dataclass(frozen=True, eq=False)
class EightBitBase:
    """The base of a layer.

    Attributes:
        linears: The weights, their factors, and the adapters, for one launch.
        kernel: vLLM's kernel, which quantises inputs and multiplies them.
        weight: The weights as vLLM keeps them (h, O).
        scale: The factors of the weights as vLLM keeps them.
        dtype: The dtype of the outputs.
    """

    linears: EightBits
    kernel: Any
    weight: Tensor
    scale: Tensor
    dtype: torch.dtype

    def product(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """The base output (M, O) by vLLM's kernel, for a quantised input (M, h) and its factors."""
        shape = [x8.shape[0], self.weight.shape[1]]
        found: Tensor = self.kernel.apply_scaled_mm(A=x8, B=self.weight, out_dtype=self.dtype, As=x_scale, Bs=self.scale, bias=None, output_shape=shape)
        return found

    def load_again(self, layer: Any) -> None:
        """Copy the weights and factors that the layer has now into the memory of the first loading, whose addresses captured graphs contain."""
        weight, scale, _, _ = self.kernel._get_layer_params(layer)
        for own, new in ((self.weight, weight), (self.scale, scale)):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)
                new.data = own


def kernel_of(under: Any, layer: Any) -> Any:
    """vLLM's kernel for a layer whose 8-bit weights have one factor, or one for every output, and whose input is quantised by one factor, or by one for every
    token; None for all other layers."""
    try:
        from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
    except ImportError:
        return None
    kernel = getattr(under, "fp8_linear", None) or getattr(getattr(layer, "scheme", None), "fp8_linear", None)
    if kernel is None or type(kernel) is not CutlassFP8ScaledMMLinearKernel:
        return None
    weight, scale, _, _ = kernel._get_layer_params(layer)
    hidden, outputs = weight.shape
    fits = weight.dtype == torch.float8_e4m3fn and weight.stride(0) == 1 and outputs == kernel.logical_output_size and scale.numel() in (1, outputs)
    return kernel if fits and hidden == layer.input_size_per_partition else None


def base_of(kernel: Any, layer: Any, adapters: Adapters) -> EightBitBase:
    """The base of a layer with this kernel and these adapters."""
    weight, scale, _, _ = kernel._get_layer_params(layer)
    return EightBitBase(EightBits.of(weight.data.t(), scale.data, adapters), kernel, weight.data, scale.data, adapters.gate.dtype)


def quantised(kernel: Any, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input (M, h), quantised as vLLM does for the layer, and its factors; compilers join this to the operation before it."""
    _, _, x_scale, upper = kernel._get_layer_params(layer)
    x8, x_scale = kernel.quant_fp8(x, x_scale, upper)
    return x8, x_scale
