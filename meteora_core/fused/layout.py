"""The memory of a fused group: one block with the weights of all members, whose parameters are views of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.model.layer import MeteoraLinear
from meteora_kernels import Adapters, Group
from meteora_kernels.operators import eager
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.wide import Wide


class Layout:
    """Moves the weights of one to three layers into one block of memory.

    No weight is stored twice, and weights that are loaded into the layers later take effect at once.

    Args:
        layers: The members, in the order in which their model calls them. They have equal ranks, scaling, dtype and device.

    Attributes:
        group: The block in the form that the kernels accept. If ``group.wide`` is set, the rows of the block also hold a copy of B^T, which :meth:`refresh`
            updates.
    """

    def __init__(self, layers: Sequence[MeteoraLinear]) -> None:
        self.layers = tuple(layers)
        first = layers[0]
        weight, widths = first.weight, tuple(layer.out_features for layer in layers)
        count, rank, outputs = len(first.ranks), sum(first.ranks), sum(widths)
        wide = Wide(first.in_features, rank, len(layers))
        # PyTorch does not count changes of inference tensors, so a stale copy of B^T would go unnoticed.
        counted = not any(layer.lora_B.is_inference() for layer in layers)
        has_up = counted and wide.pays(weight.dtype)
        gate_rows, stacked = gate_rows_of(count), stacked_rows_of(count, rank)
        with torch.inference_mode(False), torch.no_grad():
            rows = -(-(outputs + len(layers) * stacked) // 128) * 128
            packed = wide.new_block(rows, weight) if has_up else weight.new_zeros(rows, first.in_features)
            lora_B = torch.empty(rank * outputs, dtype=weight.dtype, device=weight.device)
            bias = weight.new_zeros(outputs) if any(layer.bias is not None for layer in layers) else None
            row, extra, begin = 0, outputs, 0
            for layer, width in zip(layers, widths, strict=True):
                _move(layer.weight, packed[row : row + width])
                _move(layer.gate, packed[extra : extra + count])
                _move(layer.lora_A, packed[extra + gate_rows : extra + gate_rows + rank])
                _move(layer.lora_B, lora_B[begin : begin + rank * width].view(rank, width))
                if bias is not None and layer.bias is not None:
                    _move(layer.bias, bias[row : row + width])
                if save_contiguous not in layer._state_dict_hooks.values():
                    layer.register_state_dict_post_hook(save_contiguous)  # type: ignore[no-untyped-call]
                row, extra, begin = row + width, extra + stacked, begin + rank * width
            adapters = Adapters.of_group(packed, lora_B, first.scaling, first.offsets, widths, first.max_rank)
            self.group = Group.of(packed, adapters, bias, has_up=has_up)
        keep_addresses(self.group)
        holders: list[tuple[dict[str, Any], str, Tensor]] = [
            (module._parameters, name, parameter) for layer in layers for module, name, parameter in _named_parameters(layer)
        ]
        holders.append((first._buffers, "scaling", first.scaling))
        self._addresses = [(holder, name, tensor, tensor.data_ptr()) for holder, name, tensor in holders]
        self._ups: list[Tensor] = [layer.lora_B for layer in layers]
        self._versions: list[int] = []

    def is_current(self) -> bool:
        """Whether every parameter is still a view of the block, so none was replaced or moved to another dtype or device."""
        for holder, name, tensor, address in self._addresses:  # noqa: SIM110 (all() takes twice as long, and this runs at every call)
            if holder[name] is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def refresh(self) -> None:
        """Update the copy of B^T in the rows of the block if B has changed since the last call. Traced calls do not read the copy, and do not update it."""
        group = self.group
        if group.wide is None:
            return
        versions = [up._version for up in self._ups]
        if versions != self._versions and eager(group.packed):
            with torch.no_grad():
                group.wide.place_up(group.packed, group.adapters.lora_B, list(group.adapters.widths))
            self._versions = versions


def keep_addresses(group: Group) -> None:
    """Tell ``torch.compile`` that a group's tensors stay where they are, as a module's parameters do; otherwise a compiled model that replays CUDA graphs
    (``mode="max-autotune"`` or ``"reduce-overhead"``) copies all weights before every call."""
    for tensor in (group.packed, group.adapters.lora_B, group.adapters.scaling, group.adapters.offsets, group.flags, group.bias):
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


def give_own_memory(layer: MeteoraLinear) -> None:
    """Undo :class:`Layout` for a layer: give each of its parameters separate memory."""
    with torch.no_grad():
        for _, _, parameter in _named_parameters(layer):
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def save_contiguous(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state-dict hook that makes tensors contiguous, because ``save_pretrained`` rejects tensors that are not."""
    for name, parameter in layer.named_parameters():
        tensor = state.get(prefix + name)
        if tensor is not None and tensor is not parameter and not tensor.is_contiguous():
            state[prefix + name] = tensor.contiguous()


def _named_parameters(layer: MeteoraLinear) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters of a layer, each with the module that holds it and its name in that module."""
    base: nn.Module = layer.base_layer
    named = [(base, "weight", layer.weight), (layer, "gate", layer.gate), (layer, "lora_A", layer.lora_A), (layer, "lora_B", layer.lora_B)]
    return named if layer.bias is None else [*named, (base, "bias", layer.bias)]


def _move(parameter: Tensor, target: Tensor) -> None:
    target.copy_(parameter.detach())
    parameter.data = target
