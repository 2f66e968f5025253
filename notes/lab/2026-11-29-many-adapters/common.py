"""What the scripts of this folder share: groups of linears with random weights, a float64 check, timings in CUDA graphs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench import timing
from meteora_kernels import Adapters
from meteora_kernels import Group as Fused
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of

SHAPES = {"qkv": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gu": ((14336, 14336), 4096), "down": ((4096,), 14336)}
"""The groups of one decoder layer of Llama-3-8B: outputs of the members, inputs."""


class Group:
    """One group of linears with N adapters of one rank."""

    def __init__(self, name: str, adapters: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.name, (self.widths, self.hidden) = name, SHAPES[name]
        self.adapters, self.rank, self.total = adapters, rank, adapters * rank
        self.gates, self.stacked = gate_rows_of(adapters), stacked_rows_of(adapters, adapters * rank)
        self.outputs = sum(self.widths)

        def draw(*shape: int, scale: float) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda").normal_(0.0, scale)

        rows = -(-(self.outputs + len(self.widths) * self.stacked) // 128) * 128
        self.packed = draw(rows, self.hidden, scale=self.hidden**-0.5)
        self.weights = [part.clone() for part in self.packed[: self.outputs].split(list(self.widths))]
        self.up = draw(self.total * self.outputs, scale=0.1 * rank**-0.5)
        self.scaling = torch.full((adapters,), 2.0, device="cuda")
        self.offsets = torch.arange(adapters + 1, device="cuda") * rank
        self.fused = Fused.of(self.packed, Adapters.of_group(self.packed, self.up, self.scaling, self.offsets, self.widths, rank))

    @property
    def ga(self) -> Tensor:
        return self.packed[self.outputs : self.outputs + len(self.widths) * self.stacked]

    def gate(self, member: int) -> Tensor:
        return self.ga[member * self.stacked : member * self.stacked + self.adapters]

    def input(self, tokens: int, pool: int = 0, run: int = 8, seed: int = 0) -> Tensor:
        """Random x; with a pool, runs of ``run`` tokens share two adapters out of ``pool``."""
        torch.manual_seed(seed)
        x = torch.randn(tokens, self.hidden, device="cuda")
        if pool:
            chosen = torch.randperm(self.adapters, device="cuda")[: min(pool, self.adapters)]
            runs = -(-tokens // run)
            pairs = torch.stack([chosen[torch.randperm(len(chosen), device="cuda")[:2]] for _ in range(runs)]).repeat_interleave(run, 0)[:tokens]
            for member in range(len(self.widths)):
                gate = self.gate(member).float()
                x += 12.0 * gate[pairs[:, 0]] + 11.0 * gate[pairs[:, 1]]
        return x.to(self.packed.dtype)

    def base(self, x: Tensor) -> None:
        for weight in self.weights:
            F.linear(x, weight)

    def exact(self, x: Tensor, columns: int = 96) -> tuple[Tensor, Tensor, Tensor]:
        """Some output columns, and in float64 what the base and the whole give there."""
        wide, start, places, bases, wholes = x.double(), 0, [], [], []
        for member, width in enumerate(self.widths):
            place = torch.randperm(width, generator=torch.Generator().manual_seed(3))[:columns].cuda()
            ga = self.ga[member * self.stacked : (member + 1) * self.stacked]
            best = (wide @ ga[: self.adapters].double().t()).topk(2, dim=1)
            share = (best.values.softmax(1) * self.scaling.double()[best.indices]).repeat_interleave(self.rank, 1)
            rows = (best.indices[:, :, None] * self.rank + torch.arange(self.rank, device="cuda")).flatten(1)
            down = torch.einsum("mrh,mh->mr", ga[self.gates :][rows].double(), wide) * share
            up = self.up[self.total * start : self.total * (start + width)].view(self.total, width)[:, place][rows].double()
            places.append(place + start)
            bases.append(wide @ self.packed[places[-1]].double().t())
            wholes.append(bases[-1] + torch.einsum("mr,mrc->mc", down, up))
            start += width
        return torch.cat(places), torch.cat(bases, dim=1), torch.cat(wholes, dim=1)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error, median over tokens."""
    return float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).median())


def check(group: Group, x: Tensor, output: Tensor) -> str:
    """Error of the output and of the base alone, in thousandths, on 32 tokens; the worst token too."""
    pick = torch.linspace(0, len(x) - 1, min(32, len(x))).long().cuda()
    places, base, exact = group.exact(x[pick])
    own = error(F.linear(x[pick], group.packed[places]), base)
    got = output[pick][:, places]
    worst = float(((got.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())
    flaw = "" if bool(output.isfinite().all()) else " NOT FINITE"
    return f"err {error(got, exact) * 1e3:.2f} (base {own * 1e3:.2f}, worst {worst * 1e3:.1f}){flaw}"


graphs: list[Callable[[], object]] = []


def capture(work: Callable[[], object]) -> Callable[[], object]:
    graphs.append(work)  # keeps the tensors alive that the graph reads
    return timing.capture(work)


def times(works: dict[str, Callable[[], object]], rounds: int = 25) -> dict[str, float]:
    """Median microseconds of each, in turn, in a new order every round."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for number in range(rounds + 2):
        for name in order.sample(list(works), len(works)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            works[name]()
            end.record()
            end.synchronize()
            if number > 1:
                taken[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(found) for name, found in taken.items()}
