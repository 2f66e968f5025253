"""The layers that can carry adapters: ``nn.Linear`` and its subclasses, and transformers' ``Conv1D``, which stores the transposed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.model.offload import real_tensor
from meteora_core.model.sharded import full_tensor, is_spread
from meteora_core.tensors import is_quantized


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' ``Conv1D``, the linear layer of GPT-2, whose weight has the shape (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def can_carry(module: nn.Module) -> bool:
    """Whether a layer can carry adapters."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features_of(module: nn.Module) -> tuple[int, int]:
    """The numbers of input and output features of a layer that can carry adapters."""
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return module.in_features, module.out_features  # type: ignore[return-value]


def plain_weight(module: nn.Module, path: str) -> Tensor:
    """The weight (out, in) of a layer that can carry adapters, gathered, read from accelerate's files, or dequantised if necessary.

    Args:
        module: The layer.
        path: Path of the layer in the model, for error messages.

    Raises:
        UsageError: The weight is quantised in a way that PEFT cannot undo, or it has no values.
    """
    weight = real_tensor(module, "weight", path)
    if is_quantized(weight):
        from peft.utils.integrations import dequantize_module_weight

        try:
            weight = dequantize_module_weight(module)
        except Exception as unknown:  # each kind of quantisation fails in its own way
            raise UsageError(f"{path} is quantised, and its weight cannot be read as numbers", hint="load the base model unquantised") from unknown
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UsageError(f"{path} is quantised, and its weight cannot be read as numbers", hint="load the base model unquantised")
    weight = full_tensor(weight) if is_spread(weight) else weight
    return (weight.t() if is_conv1d(module) else weight).detach()


def bias_of(module: nn.Module, path: str) -> Tensor | None:
    """The bias (out,) of a layer that can carry adapters, or None."""
    if not isinstance(getattr(module, "bias", None), Tensor):
        return None
    bias = real_tensor(module, "bias", path)
    return (full_tensor(bias) if is_spread(bias) else bias).detach()


def float_table(values: Tensor | None, device: torch.device) -> Tensor | None:
    """A table of a stack in float32 on a device; None if there is none."""
    return None if values is None else values.to(device, torch.float32)


class WrappedLinear(nn.Module):
    """The base of layers that take the place of a linear layer and run it: models see the weight and the bias of the wrapped layer.

    Attributes:
        base_layer: The linear layer that is wrapped.
    """

    base_layer: nn.Module

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some models read its dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]
