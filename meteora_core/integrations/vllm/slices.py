"""The part of a layer's adapters that a process of a tensor-parallel group computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """The inputs and outputs of a layer that this process computes.

    Attributes:
        inputs: First input and number of inputs.
        outputs: For every part of the layer's output (q, k, v; gate, up): its total number of outputs, and the first one and the number in this process.
        sums: Whether the outputs of all processes are summed (a row-parallel layer), so that gate logits must be summed too.
    """

    inputs: tuple[int, int]
    outputs: tuple[tuple[int, int, int], ...]
    sums: bool

    @classmethod
    def of(cls, layer: Any, sizes: list[int]) -> Slices:
        """The slices of a layer.

        Args:
            layer: One of vLLM's linear layers.
            sizes: Number of outputs of each part in this process.
        """
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

        size, rank = layer.tp_size, layer.tp_rank
        if size == 1 or not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            return cls((0, layer.input_size), tuple((width, 0, width) for width in sizes), False)
        if isinstance(layer, RowParallelLinear):
            mine = layer.input_size_per_partition
            return cls((rank * mine, mine), tuple((width, 0, width) for width in sizes), True)
        parts = []
        for index, width in enumerate(sizes):
            copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
            parts.append((width * (size // copies), rank // copies * width, width))
        return cls((0, layer.input_size), tuple(parts), False)

    def of_inputs(self, weights: Tensor) -> Tensor:
        """The columns (., h) of a gate or of A that belong to the inputs of this process."""
        return weights.narrow(1, *self.inputs)

    def of_outputs(self, lora_B: Tensor, member: int | None) -> Tensor:
        """The columns of B (R, o) that belong to the outputs of this process.

        Args:
            lora_B: B of a layer of the checkpoint.
            member: Index of the part of the output that the layer computes; None if it computes all parts.
        """
        chosen = self.outputs if member is None else self.outputs[member : member + 1]
        if lora_B.shape[1] != (total := sum(width for width, _, _ in chosen)):
            raise ValueError(f"B has {lora_B.shape[1]} outputs, and vLLM's layer has {total}")
        parts, begin = [], 0
        for width, first, count in chosen:
            parts.append(lora_B.narrow(1, begin + first, count))
            begin += width
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
