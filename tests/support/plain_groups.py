"""A fused group in plain PyTorch, in place of the kernels where a test is about what uses them (the interpreter needs seconds a pass)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import lora_mixture


def group_forward(
    x: Tensor,
    packed: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    flags: Tensor,
    widths: list[int],
    rank: int,
    max_rank: int,
    top_k: int,
    temperature: float,
) -> Tensor:
    """Arguments and result as in ``meteora_kernels.triton_group.group_forward``."""
    from meteora_kernels.stacked import gate_rows_of, stacked_rows_of

    count, outputs = scaling.shape[0], sum(widths)
    begin, stacked = gate_rows_of(count), stacked_rows_of(count, rank)
    parts, start = [], 0
    for member, (width, base) in enumerate(zip(widths, F.linear(x, packed[:outputs], bias).split(widths, dim=-1), strict=True)):
        block = packed[outputs + member * stacked :]
        up = b[rank * start : rank * (start + width)].view(rank, width)
        down = block[begin : begin + rank]
        options = {"top_k": top_k, "temperature": temperature, "allowed": allowed, "backend": "dense"}
        parts.append(lora_mixture(x, base.contiguous(), block[:count], down, up, scaling, offsets, **options))
        start += width
    return torch.cat(parts, dim=-1)


def use_plain_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run fused groups by :func:`group_forward`; the list fills with the number of members of each group that ran."""
    from meteora_core.model import fuse
    from meteora_kernels import triton_group

    ran: list[int] = []
    compute = fuse.FusedGroup._compute

    def counted(self: fuse.FusedGroup, x: Tensor) -> tuple[Tensor, ...]:
        ran.append(len(self.layers))
        return compute(self, x)

    monkeypatch.setattr(triton_group, "group_forward", group_forward)
    monkeypatch.setattr(fuse.FusedGroup, "_compute", counted)
    return ran
