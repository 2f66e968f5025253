"""The memory layout of a layer's gates and adapters, and of the base weights that are computed together with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meteora_core.integrations.vllm.checkpoint import Store
from meteora_core.integrations.vllm.slices import Slices
from meteora_kernels import Adapters, Group
from meteora_kernels.group import reads_up
from meteora_kernels.plan import Facts
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.wide import Wide

WIDEST = 16384
"""By default, layers with more outputs have no copy of B: it would be the largest part of the memory, and saves little time in these layers."""
PREFILL = (257, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of tokens for which the kernels' tables choose different paths of prefill."""


@dataclass(frozen=True)
class Shape:
    """Ranks and sizes that the members of a layer share.

    The kernels require the same ranks and scaling in all members. Therefore, an adapter has the largest of its ranks in every member, padded with rows of
    zeros; in a member whose scaling differs, B is multiplied by the ratio; a member without adapters is all zeros.

    Attributes:
        paths: Path of every member's layer in the checkpoint; None for members without adapters.
        widths: Number of outputs of every member in this process.
        ranks: Rank of every adapter.
        scaling: Scaling of every adapter.
    """

    paths: tuple[str | None, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    @classmethod
    def of(cls, store: Store, paths: Sequence[str | None], widths: Sequence[int]) -> Shape:
        """The shape of the members with these paths."""
        modules = [store.modules[path] for path in paths if path is not None]
        count = len(store.names)
        ranks = tuple(max(module["ranks"][index] for module in modules) for index in range(count))
        scaling = tuple(next((float(module["scaling"][index]) for module in modules if module["ranks"][index]), 1.0) for index in range(count))
        return cls(tuple(paths), tuple(widths), ranks, scaling)

    @property
    def total_rank(self) -> int:
        """The sum of the ranks R."""
        return sum(self.ranks)

    @property
    def stacked(self) -> int:
        """The number of rows of one member's gates and A, including padding."""
        return stacked_rows_of(len(self.ranks), self.total_rank)


def copies_up(shape: Shape, hidden: int, like: Tensor, *, widest: int, top_k: int) -> bool:
    """Whether a block with base weights should also hold B^T, as a copy that prefill reads.

    Args:
        shape: The members.
        hidden: Number of inputs in this process.
        like: A tensor with the dtype and the device of the block.
        widest: The largest number of outputs of layers with a copy.
        top_k: The default number of adapters per token.
    """
    facts = Facts(hidden, shape.widths, len(shape.ranks), shape.total_rank, max(shape.ranks), like.dtype, like.device)
    pays = Wide(hidden, shape.total_rank, len(shape.widths)).pays(like.dtype)
    return pays and sum(shape.widths) <= widest and reads_up(facts, PREFILL, top_k)


class Block:
    """The tensors of one layer.

    Args:
        shape: The members.
        hidden: Number of inputs in this process.
        like: A tensor with the dtype and the device of the block.
        base: Whether the base weights (O, h) are the first rows of the block.
        wide: Whether its rows may also hold B^T (:mod:`meteora_kernels.wide`).

    Attributes:
        rows: The block (P, h): the base weights, if it has them, and then, for every member, N gate rows, padding, R rows of A, and padding.
        lora_B: B (R, width) of every member, one after the other, flat.
        group: The members for :func:`meteora_kernels.run_group`; None without base weights.
        adapters: All members, for kernels that add adapters to the output of the base layer.
        single: The adapters of every member, for :func:`meteora_kernels.mix`; None for members without.
    """

    def __init__(self, shape: Shape, hidden: int, like: Tensor, *, base: bool, wide: bool) -> None:
        self.shape, self.base = shape, base
        outputs, members, rank, count = sum(shape.widths), len(shape.widths), shape.total_rank, len(shape.ranks)
        device, dtype = like.device, like.dtype
        first = outputs if base else 0
        layout = Wide(hidden, rank, members)
        has_up = base and wide and layout.pays(dtype)
        total = -(-(first + members * shape.stacked) // 128) * 128 if base else members * shape.stacked
        self.rows = layout.new_block(total, like) if has_up else torch.zeros(total, hidden, dtype=dtype, device=device)
        self.lora_B = torch.zeros(rank * outputs, dtype=dtype, device=device)
        self.scaling = torch.tensor(shape.scaling, dtype=torch.float32, device=device)
        ends = [0]
        for each in shape.ranks:
            ends.append(ends[-1] + each)
        self.offsets = torch.tensor(ends, dtype=torch.int64, device=device)
        self._layout = layout if has_up else None
        gates, largest = self.rows[first:], max(shape.ranks)
        self.adapters = Adapters(gates, gates[gate_rows_of(count) :], self.lora_B, self.scaling, self.offsets, largest, shape.widths, shape.stacked)
        self.group = None
        if base:
            adapters = Adapters.of_group(self.rows, self.lora_B, self.scaling, self.offsets, shape.widths, largest)
            self.group = Group.of(self.rows, adapters, has_up=has_up)
        self.single = [None if path is None else self._member(index) for index, path in enumerate(shape.paths)]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to register as the layer's buffers, by name, so that vLLM's sleep mode and reloading handle them."""
        found = {"meteora_rows": self.rows, "meteora_B": self.lora_B, "meteora_scaling": self.scaling, "meteora_offsets": self.offsets}
        return found if self.group is None else {**found, "meteora_flags": self.group.flags}

    def _parts(self, member: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (N, h), A (R, h) and B (R, width) of a member, as views."""
        shape, count = self.shape, len(self.shape.ranks)
        begin = (sum(shape.widths) if self.base else 0) + member * shape.stacked
        before, width, rank = sum(shape.widths[:member]), shape.widths[member], shape.total_rank
        low = begin + gate_rows_of(count)
        B = self.lora_B[before * rank : (before + width) * rank].view(rank, width)
        return self.rows[begin : begin + count], self.rows[low : low + rank], B

    def _member(self, member: int) -> Adapters:
        gate, A, B = self._parts(member)
        return Adapters.of_layer(gate, A, B, self.scaling, self.offsets, max(self.shape.ranks))

    def fill(self, store: Store, slices: Slices) -> None:
        """Copy gates and adapters from the checkpoint."""
        shape = self.shape
        alone = len(shape.paths) == 1
        for member, path in enumerate(shape.paths):
            if path is None:
                continue
            gate, A, B = self._parts(member)
            module = store.modules[path]
            gate.copy_(slices.of_inputs(store.tensor(f"{path}.gate")))
            own_A = slices.of_inputs(store.tensor(f"{path}.lora_A"))
            own_B = slices.of_outputs(store.tensor(f"{path}.lora_B"), None if alone else member)
            if tuple(module["ranks"]) == shape.ranks and tuple(map(float, module["scaling"])) == shape.scaling:
                A.copy_(own_A)
                B.copy_(own_B)
                continue
            at, source = 0, 0
            for index, room in enumerate(shape.ranks):
                rank, scaling = module["ranks"][index], float(module["scaling"][index])
                if rank:
                    up = own_B[source : source + rank]
                    A[at : at + rank].copy_(own_A[source : source + rank])
                    B[at : at + rank].copy_(up if scaling == shape.scaling[index] else up.float() * (scaling / shape.scaling[index]))
                at, source = at + room, source + rank
        self.place_up()

    def place_up(self) -> None:
        """Copy B into the columns that the block has for it, if any."""
        if self._layout is not None:
            self._layout.place_up(self.rows, self.lora_B, list(self.shape.widths))


def weights_of(block: Block) -> Tensor:
    """The base weights (O, h) at the start of a block."""
    return block.rows[: sum(block.shape.widths)]


def buffers(layer: Any, tensors: dict[str, Tensor]) -> None:
    """Register tensors with a module, without saving them in its state."""
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor, persistent=False)
