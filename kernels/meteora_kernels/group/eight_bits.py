"""Linears that share their input, over a base in 8-bit floating-point numbers: base product and adapters in one launch, for a few dozen tokens.

The base is that of an inference engine: weights with one factor, or one for every output, and an input that is quantised already, with one factor, or one for
every token. Gates and A read the input before it was quantised. :func:`meteora_kernels.group.one_launch.launch` computes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meteora_kernels.group import CAN_RUN, one_launch
from meteora_kernels.group.one_launch import Eight
from meteora_kernels.operators import on_device_of
from meteora_kernels.plan import Case, Facts, Row, choose, readable, table_of
from meteora_kernels.plan.choose import choices_of
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.types import Adapters, Routing, new_flags

LEAST = (1, 8, 17)
"""Numbers of tokens from which tables may have a row for one launch; a row for more tokens serves fewer, too."""


@dataclass(frozen=True, eq=False)
class EightBits:
    """One to three linears that share their input, with 8-bit base weights. :meth:`of` makes one.

    Attributes:
        weights: Base weights of all members, float8_e4m3fn (O, h), columns contiguous.
        scale: Factor of the weights, float32 (O,) or (1,), contiguous.
        adapters: The members' adapters.
        flags: Flags int32 (1024,), zero before and after every launch; a group runs on one stream at a time.
        gate_rows: Number of rows from a member's first gate row to its first row of A.
        facts: The sizes that the choice of a row depends on.
        aligned: Whether the copy engine can read the weights, gates and A.
        bias: Always None.
        choices: The rows that were chosen, by number of tokens and top-k; None where no row fits.
    """

    weights: Tensor
    scale: Tensor
    adapters: Adapters
    flags: Tensor
    gate_rows: int
    facts: Facts
    aligned: bool
    bias: None
    choices: dict[Any, Any]

    @classmethod
    def of(cls, weights: Tensor, scale: Tensor, adapters: Adapters) -> EightBits:
        """The linears with these weights, scale and adapters, whose gates and A are one block (``member_rows`` apart), in 16 bits."""
        gate = adapters.gate
        facts = Facts(weights.shape[1], adapters.widths, adapters.number, adapters.total_rank, adapters.max_rank or 0, gate.dtype, gate.device)
        aligned = readable(gate) and _readable(weights)
        scale = scale.reshape(-1).contiguous()
        return cls(weights, scale, adapters, new_flags(gate.device), gate_rows_of(adapters.number), facts, aligned, None, choices_of(facts))

    @property
    def packed(self) -> Tensor:
        """The block of gates and A."""
        return self.adapters.gate


def _readable(values: Tensor) -> bool:
    """Whether the copy engine can read 8-bit rows: columns contiguous, every row aligned to 16 bytes."""
    return values.dtype == torch.float8_e4m3fn and values.stride(-1) == 1 and not values.stride(-2) % 16 and not values.data_ptr() % 16


def row_for(group: EightBits, tokens: int, top_k: int) -> Row | None:
    """The row of the table for a number of tokens: the one by which 16-bit weights of these sizes would be computed in one launch; None if there is none.

    Args:
        group: The linears.
        tokens: Number of tokens M.
        top_k: Number of adapters per token k.
    """
    if not group.aligned:
        return None
    key = "eight", tokens, top_k
    if key not in group.choices:
        group.choices[key] = _row_for(group, tokens, top_k)
    row: Row | None = group.choices[key]
    return row


def _row_for(group: EightBits, tokens: int, top_k: int) -> Row | None:
    table = table_of(group.facts.device).group
    for count in sorted({max(tokens, least) for least in LEAST}):
        row = choose(table, Case(group.facts, count, top_k, aligned=True), CAN_RUN)
        if row.path == "one_launch":
            return row
    return None


def run_eight_bits(x: Tensor, x8: Tensor, x_scale: Tensor, group: EightBits, routing: Routing) -> Tensor | None:
    """Outputs of base and adapters together: (M, O), contiguous, in the dtype of x; None if no row of the table fits.

    Args:
        x: Input (M, h) in 16 bits, columns contiguous.
        x8: The same input, quantised: float8_e4m3fn (M, h), columns contiguous.
        x_scale: Factor of ``x8``, float32, of M numbers or of one.
        group: The linears.
        routing: Top-k, routing temperature and ``allowed``; given routes are not supported.
    """
    row = row_for(group, x.shape[0], routing.top_k)
    if row is None or not (readable(x) and _readable(x8)):
        return None
    with on_device_of(group.weights):
        return one_launch.launch(x, group, routing, row, Eight(group.weights, group.scale, x8, x_scale.reshape(-1).contiguous()))
