"""A fused group in plain PyTorch, in place of the kernels where a test is about what uses them (the interpreter needs seconds a pass)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Group, Routing, mix, route, route_rows
from meteora_kernels.plan import Row
from meteora_kernels.types import WHOLE, Form


class PlainPath:
    """A path that can run everything, in place of the modules in ``meteora_kernels.group.PATHS``."""

    @staticmethod
    def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
        """Arguments and result as in a path."""
        x = x.reshape(-1, x.shape[-1])
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


def use_plain_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run fused groups by :class:`PlainPath`; the list fills with the number of members of each group that ran."""
    from meteora_core.fused.group import FusedGroup
    from meteora_kernels.group import PATHS

    ran: list[int] = []
    run = FusedGroup._run

    def counted(self: FusedGroup, x: Tensor) -> Sequence[Tensor]:
        ran.append(len(self.layers))
        return run(self, x)

    for name in PATHS:
        monkeypatch.setitem(PATHS, name, PlainPath)
    monkeypatch.setattr(FusedGroup, "_run", counted)
    return ran
