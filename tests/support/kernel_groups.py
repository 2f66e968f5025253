"""Groups of linears with random weights, and plans of one line, for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import lora_mixture, plan
from meteora_kernels.triton_backend import pack, stacked_rows_of
from meteora_kernels.triton_decode import new_flags
from meteora_kernels.wide import Wide
from support.mixture_cases import Case, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = [3, 0, 8, 1, 5]
TILE = (16, 32, 16, 4, 2)
"""Steps so short that 72 columns are several pieces."""
SPARE = 5
"""Rows that do not matter, at the end of the block."""


@dataclass
class Members:
    """The linears of a group, and what :func:`group_forward` wants of them."""

    cases: list[Case]
    weight: Tensor
    bias: Tensor | None
    packed: Tensor
    up: Tensor
    flags: Tensor
    widths: tuple[int, ...]

    @property
    def x(self) -> Tensor:
        return self.cases[0].x

    def arguments(self, top_k: int = 2, allowed: Tensor | None = None) -> tuple[object, ...]:
        case = self.cases[0]
        sizes = (list(self.widths), sum(RANKS), max(RANKS), top_k, 1.0)
        return (self.x, self.packed, self.up, self.bias, case.scaling, case.offsets, allowed, self.flags, *sizes)

    def exact(self, top_k: int = 2, allowed: Tensor | None = None) -> Tensor:
        """The reference's output in float64, of the weights as they are."""
        base = F.linear(self.x.double(), self.weight.double(), None if self.bias is None else self.bias.double()).split(self.widths, dim=-1)
        parts = []
        for part, case in zip(base, self.cases, strict=True):
            tensors = (case.gate.double(), case.lora_A.double(), case.lora_B.double(), self.cases[0].scaling, self.cases[0].offsets)
            parts.append(lora_mixture(self.x.double(), part, *tensors, top_k=top_k, allowed=allowed, backend="reference"))
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]


def members(widths: tuple[int, ...], tokens: int, bias: bool, dtype: torch.dtype, hidden: int = 72) -> Members:
    """A group with random weights; the adapters' share is about a fifth of the output, and the block ends in rows that do not matter."""
    cases = [make(RANKS, hidden, width, (tokens,), torch.float64, seed=seed, device=DEVICE) for seed, width in enumerate(widths)]
    for case in cases:
        case.lora_B *= 0.2
    cases = [case.copy(dtype) for case in cases]
    generator = torch.Generator().manual_seed(9)
    weight = (torch.randn(sum(widths), hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
    shift = torch.randn(sum(widths), generator=generator).to(DEVICE, dtype) if bias else None
    ga = torch.cat([pack(case.gate, case.lora_A) for case in cases])
    assert ga.shape[0] == stacked_rows_of(len(RANKS), sum(RANKS)) * len(widths)
    packed = torch.cat([weight, ga, torch.ones(SPARE, hidden, device=DEVICE, dtype=dtype)])
    up = torch.cat([case.lora_B.reshape(-1) for case in cases])
    return Members(cases, weight, shift, packed, up, new_flags(cases[0].x.device), widths)


def widened(group: Members) -> tuple[Members, Wide]:
    """The same group, its block with B^T beside the weights."""
    wide = Wide(group.x.shape[1], sum(RANKS), len(group.widths))
    packed = wide.new_block(len(group.packed), group.packed)
    packed.copy_(group.packed)
    wide.place_up(packed, group.up, list(group.widths))
    group.packed = packed
    return group, wide


def laid(x: Tensor, wide: Wide) -> Tensor:
    """x in a buffer whose other columns are NaN."""
    rows = wide.new_rows(x.shape[0], x)
    wide.whole(rows).fill_(float("nan"))
    return rows.copy_(x)


def use(monkeypatch: pytest.MonkeyPatch, order: str, pieces: int = 0, tile: tuple[int, int, int, int, int] | None = None, gate_pieces: int = 0) -> None:
    """A plan of one line."""
    monkeypatch.setattr(plan, "GROUPS", (plan.GroupRule(order, 17, plan.EVER, pieces, tile, gate_pieces),))
