"""Arguments that kernels take as values made once: the adapters of a layer, the routing, and a fused group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meteora_kernels.plan.choose import choices_of
from meteora_kernels.plan.machine import readable
from meteora_kernels.plan.table import Facts, Row
from meteora_kernels.sizes import padded_adapters, power_of_two
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.tile import Tile
from meteora_kernels.wide import Wide

__all__ = ["TEMPERATURES", "WHOLE", "Adapters", "Block", "Form", "Group", "Routing", "Tile", "new_flags"]


class Adapters(NamedTuple):
    """The adapters of one linear, or of one to three linears that share their input (members of a group).

    The number of adapters N, their ranks and their scaling are the same for all members. :meth:`of_layer` and :meth:`of_group` make one.

    Attributes:
        gate: Gate weights (., h), columns contiguous; the N gate rows of member i start at row ``i * member_rows``.
        lora_A: A of all adapters (., h), with the row stride of ``gate``; member i's R rows start at row ``i * member_rows``, where R is the sum of ranks.
        lora_B: B (R, width) of every member, contiguous, one after the other, flat or 2-d; row ``j`` is column ``j`` of the usual (width, R) matrix.
        scaling: Scaling of every adapter, float32 (N,): alpha / r, or alpha / sqrt(r) with rsLoRA.
        offsets: Row ranges of the adapters, int64 (N + 1,): adapter ``i`` owns rows ``offsets[i]:offsets[i + 1]`` of A and B.
        max_rank: The largest rank; None if the caller does not know it.
        widths: Number of outputs of each member.
        member_rows: Number of rows from one member to the next; 0 for a single linear.

    Example:
        >>> import torch
        >>> from meteora_kernels import Adapters
        >>> offsets = torch.tensor([0, 8, 12])  # two adapters, of ranks 8 and 4
        >>> adapters = Adapters.of_layer(torch.randn(2, 16), torch.randn(12, 16), torch.randn(12, 24), torch.ones(2), offsets)
        >>> adapters.number, adapters.total_rank, adapters.widths
        (2, 12, (24,))
    """

    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor
    max_rank: int | None
    widths: tuple[int, ...]
    member_rows: int = 0

    @classmethod
    def of_layer(cls, gate: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, offsets: Tensor, max_rank: int | None = None) -> Adapters:
        """The adapters of one linear.

        Args:
            gate: Gate weights (N, h).
            lora_A: A of all adapters stacked by rows (R, h); an adapter may have rank 0.
            lora_B: B of all adapters (R, o).
            scaling: Scaling of every adapter, float (N,).
            offsets: Row ranges of the adapters, int64 (N + 1,).
            max_rank: The largest rank, if known.
        """
        return cls(gate, lora_A, lora_B, scaling, offsets, max_rank, (lora_B.shape[-1],))

    @classmethod
    def of_group(cls, packed: Tensor, lora_B: Tensor, scaling: Tensor, offsets: Tensor, widths: tuple[int, ...], max_rank: int) -> Adapters:
        """The adapters of a group whose gates and A follow its base weights in one block.

        Args:
            packed: The block (P, h), columns contiguous: the members' base rows (O = sum of widths), then ``stacked_rows_of(N, R)`` rows for each
                member: N gate rows, padding to ``gate_rows_of(N)``, R rows of A, padding with zeros. Rows after those are ignored.
            lora_B: B (R, width) of every member, contiguous, one after the other.
            scaling: Scaling of every adapter, float32 (N,), the same for all members.
            offsets: Row ranges of the adapters, int64 (N + 1,), the same for all members.
            widths: Number of outputs of each of one to three members.
            max_rank: The largest rank.
        """
        count, outputs = scaling.shape[0], sum(widths)
        stacked = stacked_rows_of(count, lora_B.numel() // outputs)
        gate = packed[outputs : outputs + len(widths) * stacked]
        return cls(gate, gate[gate_rows_of(count) :], lora_B, scaling, offsets, max_rank, widths, stacked)

    @property
    def number(self) -> int:
        """The number of adapters N."""
        return self.scaling.shape[0]

    @property
    def members(self) -> int:
        """The number of linears."""
        return len(self.widths)

    @property
    def total_rank(self) -> int:
        """The sum of the adapters' ranks R."""
        return self.lora_B.numel() // sum(self.widths)

    @property
    def padded(self) -> int:
        """The number of columns of a tile of logits (:func:`meteora_kernels.sizes.padded_adapters`)."""
        return padded_adapters(self.scaling.shape[0])

    @property
    def rank_p(self) -> int:
        """The number of places that kernels reserve for one adapter's rows: the largest rank rounded up to a power of two, at least 1."""
        return max(1, power_of_two(self.max_rank or 0))


TEMPERATURES = torch.finfo(torch.float32).tiny, 1 / torch.finfo(torch.float32).tiny
"""The smallest and the largest routing temperature T: the smallest normal float32 and its reciprocal. Neither T nor 1 / T underflows in float32."""


class Routing(NamedTuple):
    """How tokens choose their adapters.

    Attributes:
        top_k: Number of adapters per token k, 1 <= top_k <= N.
        temperature: Routing temperature T, in the range ``TEMPERATURES``, which divides the chosen logits before the softmax.
        allowed: Mask of the adapters that may be chosen, bool (N,); None for all. For :func:`meteora_kernels.run_group` on a GPU also the options of every
            token (:mod:`meteora_kernels.token_options`), which replace ``temperature`` and lower ``top_k``, float32 (., N + 2) or (., N + 2, 1).
        indices: Adapters to use instead of the gate's choice (forced routing), int64 (..., k), or None.
        weights: Weights of these adapters (..., k), or None.
        chosen: Memory to which :func:`meteora_kernels.run_group` on a GPU writes the choices of every token, float32 (members, M, 2 * k): the indices of
            the k adapters, then their weights; None writes nothing. Slots past the top-k of a token have weight 0. Not for calls that are traced.

    Example:
        >>> from meteora_kernels import Routing
        >>> Routing(top_k=1).given is None  # the gate decides
        True
    """

    top_k: int = 2
    temperature: float = 1.0
    allowed: Tensor | None = None
    indices: Tensor | None = None
    weights: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def slots(self) -> int:
        """``top_k`` rounded up to a power of two."""
        return power_of_two(self.top_k)

    @property
    def given(self) -> tuple[Tensor, Tensor] | None:
        """The indices and weights, or None if the gate decides."""
        return None if self.indices is None or self.weights is None else (self.indices, self.weights)


def new_flags(device: torch.device) -> Tensor:
    """Zeroed flags by which programs of one launch wait for each other, int32 (1024,); every group and CUDA stream needs a separate tensor."""
    return torch.zeros(1024, dtype=torch.int32, device=device)


class Form(NamedTuple):
    """The form of a group's input and outputs.

    Attributes:
        in_place: Whether :meth:`meteora_kernels.wide.Wide.new_rows` of the group's ``wide`` returned x, so that the columns around it may be written.
        apart: Whether the members' outputs may be separate tensors.
    """

    in_place: bool = False
    apart: bool = False


WHOLE = Form()
"""Any x, and one tensor for all outputs."""


class Block(NamedTuple):
    """The part of a :class:`Group` that a compiled graph keeps; :meth:`Adapters.of_group` describes the fields."""

    packed: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
    max_rank: int
    flags: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """One to three linears that share their input, base and adapters together. :meth:`of` makes one.

    Attributes:
        packed: The block (P, h) that holds base weights, gates and A (:meth:`Adapters.of_group`).
        weights: The base rows (O, h) of ``packed``.
        adapters: The members' adapters.
        bias: Bias of all members (O,), or None.
        flags: Flags int32 (1024,), zero before and after every launch; a group runs on one stream at a time.
        wide: The layout of a block whose rows also hold B^T (:mod:`meteora_kernels.wide`), which the owner keeps up to date; None for other blocks.
        gate_rows: Number of rows from a member's first gate row to its first row of A.
        total_rank: Sum of the adapters' ranks R.
        aligned: Whether the copy engine can read ``packed`` (:func:`meteora_kernels.plan.machine.readable`).
        facts: The sizes that the choice of a path depends on.
        choices: The choices that were made for these sizes (:func:`meteora_kernels.plan.choose.choices_of`).
        views: Views of the block that a path keeps between calls, by any key, because making a view takes the host 2 us.
    """

    packed: Tensor
    weights: Tensor
    adapters: Adapters
    bias: Tensor | None
    flags: Tensor
    wide: Wide | None
    gate_rows: int
    total_rank: int
    aligned: bool
    facts: Facts
    choices: dict[Any, Row]
    views: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: Tensor, adapters: Adapters, bias: Tensor | None = None, flags: Tensor | None = None, *, has_up: bool = False) -> Group:
        """A group from its block.

        Args:
            packed: The block (P, h) that :meth:`Adapters.of_group` describes.
            adapters: The result of :meth:`Adapters.of_group` for ``packed``.
            bias: Bias of all members (O,), or None.
            flags: Flags that :func:`new_flags` returned; None creates new ones.
            has_up: Whether ``packed`` is a block of :class:`meteora_kernels.wide.Wide` whose rows hold B^T, equal to ``adapters.lora_B`` at every call.

        Example:
            >>> packed = torch.zeros(128, 16)  # 8 outputs, then 64 rows for the gates and A of two adapters of rank 4
            >>> adapters = Adapters.of_group(packed, torch.zeros(8 * 8), torch.ones(2), torch.tensor([0, 4, 8]), (8,), 4)
            >>> Group.of(packed, adapters).total_rank
            8
        """
        _, _, _, scaling, _, max_rank, widths, _ = adapters
        hidden, count, total_rank = packed.shape[1], scaling.shape[0], adapters.total_rank
        facts = Facts(hidden, widths, count, total_rank, max_rank or 0, packed.dtype, packed.device, has_up)
        return cls(
            packed,
            packed[: sum(widths)],
            adapters,
            bias,
            new_flags(packed.device) if flags is None else flags,
            Wide(hidden, total_rank, len(widths)) if has_up else None,
            gate_rows_of(count),
            total_rank,
            readable(packed),
            facts,
            choices_of(facts),
        )

    def parts(self) -> Block:
        """The arguments of an operator for this group, which leave out :attr:`wide`."""
        _, _, lora_B, scaling, offsets, max_rank, widths, _ = self.adapters
        return Block(self.packed, lora_B, scaling, offsets, self.bias, widths, max_rank or 0, self.flags)

    @classmethod
    def of_parts(cls, parts: Block) -> Group:
        """A group from the arguments of an operator."""
        packed, lora_B, scaling, offsets, bias, widths, max_rank, flags = parts
        return cls.of(packed, Adapters.of_group(packed, lora_B, scaling, offsets, widths, max_rank), bias, flags)
