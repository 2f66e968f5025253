"""Decoding with many adapters on a CUDA GPU, all rows of A and chosen rows only: at most 20 % above the base's own error, bit-equal, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels.triton_backend import gate_rows_of, stacked_rows_of
from meteora_kernels.triton_chosen import decode_chosen
from meteora_kernels.triton_decode import decode, new_flags

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

GROUPS = [
    pytest.param((4096, 1024, 1024), 4096, id="qkv"),
    pytest.param((4096,), 4096, id="o"),
    pytest.param((14336, 14336), 4096, id="gate-up"),
    pytest.param((4096,), 14336, id="down"),
    pytest.param((1001, 777), 1000, id="odd"),
]
CHECKED = 256
"""Outputs of each member, at most, that are compared with float64."""


class Group:
    """Adapters of one rank on random weights."""

    def __init__(self, adapters: int, rank: int, widths: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(adapters + rank)

        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        self.widths, self.rank, self.total, self.gates = widths, rank, adapters * rank, gate_rows_of(adapters)
        self.stacked = stacked_rows_of(adapters, self.total)
        self.weight = draw(sum(widths), hidden, scale=hidden**-0.5)
        self.ga = draw(len(widths) * self.stacked, hidden, scale=hidden**-0.5)
        self.up = draw(self.total * sum(widths), scale=0.35 * rank**-0.5)
        self.scaling = torch.linspace(0.5, 1.5, adapters, device="cuda")
        self.offsets = torch.arange(adapters + 1, device="cuda") * rank
        self.flags = new_flags(self.weight.device)

    def arguments(self, x: Tensor) -> tuple[object, ...]:
        tensors = (x, self.weight, self.ga, self.up, None, self.scaling, self.offsets, self.flags)
        return (*tensors, self.widths, self.total, self.gates, self.rank, 2, 1.0)

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


@pytest.mark.parametrize("run", [decode, decode_chosen], ids=["all", "chosen"])
@pytest.mark.parametrize(("adapters", "rank"), [(28, 8), (256, 8), (130, 16)])
@pytest.mark.parametrize(("widths", "hidden"), GROUPS)
@torch.no_grad()
def test_few_tokens_at_real_sizes(widths: tuple[int, ...], hidden: int, adapters: int, rank: int, run: object) -> None:
    assert callable(run)
    for dtype, counts in ((torch.bfloat16, (1, 8, 16)), (torch.float16, (3,))):
        group = Group(adapters, rank, widths, hidden, dtype)
        for tokens in counts:
            x = torch.randn(tokens, hidden, generator=torch.Generator("cuda").manual_seed(tokens), device="cuda").to(dtype)
            places, base, exact = group.exact(x)
            got = run(*group.arguments(x))
            own = error(F.linear(x, group.weight)[:, places], base)
            assert error(got[:, places], exact) <= 1.2 * own, (dtype, tokens)
            assert bool(got.isfinite().all())
            assert torch.equal(run(*group.arguments(x)), got)
            assert int(group.flags.abs().sum()) == 0


@pytest.mark.parametrize("tokens", [1, 16])
@torch.no_grad()
def test_a_graph_replays_with_new_inputs(tokens: int) -> None:
    group = Group(256, 8, (4096, 1024, 1024), 4096, torch.bfloat16)
    first, second = (torch.randn(tokens, 4096, device="cuda").bfloat16() for _ in range(2))
    wanted = [decode_chosen(*group.arguments(x)) for x in (first, second)]  # type: ignore[arg-type]
    x = first.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_chosen(*group.arguments(x))  # type: ignore[arg-type]
    for given, expected in zip((second, first), reversed(wanted), strict=True):
        x.copy_(given)
        for _ in range(20):
            graph.replay()
        assert torch.equal(output, expected)
