"""A fused group in plain PyTorch, in place of the kernels where a test is about what uses them (the interpreter needs seconds a pass)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Group, Routing, mix, route, route_rows


def run_group(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> Tensor:
    """Arguments and result as in ``meteora_kernels.run_group``."""
    adapters, rank, start, parts = group.adapters, group.total_rank, 0, []
    base = F.linear(x, group.weights, group.bias).split(list(adapters.widths), dim=-1)
    for member, (width, output) in enumerate(zip(adapters.widths, base, strict=True)):
        block = adapters.gate[member * adapters.member_rows :]
        up = adapters.lora_B[rank * start : rank * (start + width)].view(rank, width)
        down = block[group.gate_rows : group.gate_rows + rank]
        own = Adapters.of_layer(block[: adapters.number], down, up, adapters.scaling, adapters.offsets)
        indices, weights = routes_of(F.linear(x, own.gate), routing)
        if routing.chosen is not None:
            routing.chosen[member] = torch.cat([indices.float(), weights.float()], dim=-1)
        parts.append(mix(x, output.contiguous(), own, Routing(routing.top_k, indices=indices, weights=weights), backend="dense"))
        start += width
    return torch.cat(parts, dim=-1)  # type: ignore[arg-type]


def routes_of(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Indices and weights (M, k) of the logits (M, N); ``routing.allowed`` may be the options of every token."""
    allowed = routing.allowed
    if allowed is None or allowed.dim() == 1:
        return route(logits, routing.top_k, routing.temperature, allowed)
    allowed = allowed.reshape(len(allowed), -1)
    mask, top_k, temperature = allowed[:, :-2], allowed[:, -2], allowed[:, -1]
    fixed = temperature[:, None] == 0
    logits = torch.where(fixed, torch.zeros_like(logits), logits)
    indices, weights = route_rows(logits, top_k.clamp(min=1), torch.where(temperature > 0, temperature, 1.0), mask != 0, routing.top_k)
    weights = torch.where(fixed, mask.gather(1, indices), weights)
    return indices, weights.masked_fill(torch.arange(routing.top_k, device=weights.device) >= top_k[:, None], 0.0)


def run_members(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> list[Tensor]:
    """Arguments and result as in ``meteora_kernels.group.run_members``."""
    output = run_group(x.reshape(-1, x.shape[-1]), group, routing)
    return list(output.view(*x.shape[:-1], -1).split(list(group.adapters.widths), dim=-1))


def use_plain_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run fused groups by :func:`run_group` and :func:`run_members`; the list fills with the number of members of each group that ran."""
    from meteora_core.fused.group import FusedGroup
    from meteora_kernels import group

    ran: list[int] = []
    run = FusedGroup._run

    def counted(self: FusedGroup, x: Tensor) -> Sequence[Tensor]:
        ran.append(len(self.layers))
        return run(self, x)

    monkeypatch.setattr(group, "run_group", run_group)
    monkeypatch.setattr(group, "run_members", run_members)
    monkeypatch.setattr(FusedGroup, "_run", counted)
    return ran
