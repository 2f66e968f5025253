"""Groups of linears with adapters of one rank at real sizes, for tests on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels import Adapters, Group
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of

CHECKED = 256
"""Outputs of each member, at most, that are compared with float64."""


class Linears:
    """Adapters of one rank on random weights.

    Attributes:
        group: What the kernels take.
    """

    def __init__(self, adapters: int, rank: int, widths: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(adapters + rank)

        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        self.widths, self.rank, self.total, self.gates = widths, rank, adapters * rank, gate_rows_of(adapters)
        self.stacked = stacked_rows_of(adapters, self.total)
        rows = draw(sum(widths) + len(widths) * self.stacked, hidden, scale=hidden**-0.5)
        self.weight, self.ga = rows[: sum(widths)], rows[sum(widths) :]
        self.up = draw(self.total * sum(widths), scale=0.35 * rank**-0.5)
        self.scaling = torch.linspace(0.5, 1.5, adapters, device="cuda")
        self.offsets = torch.arange(adapters + 1, device="cuda") * rank
        self.group = Group.of(rows, Adapters.of_group(rows, self.up, self.scaling, self.offsets, widths, rank))

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some outputs, and in float64 what the base and the whole give there."""
        wide, start, places, bases, wholes = x.double(), 0, [], [], []
        for member, width in enumerate(self.widths):
            place = torch.randperm(width, generator=torch.Generator().manual_seed(3))[:CHECKED].cuda()
            ga = self.ga[member * self.stacked : (member + 1) * self.stacked]
            best = (wide @ ga[: len(self.scaling)].double().t()).topk(2, dim=1)
            share = (best.values.softmax(1) * self.scaling.double()[best.indices]).repeat_interleave(self.rank, 1)
            rows = (best.indices[:, :, None] * self.rank + torch.arange(self.rank, device="cuda")).flatten(1)
            down = torch.einsum("mrh,mh->mr", ga[self.gates :][rows].double(), wide) * share
            up = self.up[self.total * start : self.total * (start + width)].view(self.total, width)[:, place][rows].double()
            places.append(place + start)
            bases.append(wide @ self.weight[places[-1]].double().t())
            wholes.append(bases[-1] + torch.einsum("mr,mrc->mc", down, up))
            start += width
        return torch.cat(places), torch.cat(bases, dim=1), torch.cat(wholes, dim=1)


def error(got: Tensor, wanted: Tensor) -> float:
    return float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).median())
