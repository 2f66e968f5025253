"""Many adapters above 16 tokens on a CUDA GPU: error against float64, bit-equal, a CUDA graph with both streams, no host waits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Routing
from meteora_kernels.many_adapters import FORWARDS
from support.gpu_groups import Linears, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

ROUTING = Routing(2, 1.0)
GROUPS = [
    pytest.param((4096, 1024, 1024), 4096, id="qkv"),
    pytest.param((14336, 14336), 4096, id="gate-up"),
    pytest.param((4096,), 14336, id="down"),
    pytest.param((1001, 777), 1000, id="odd"),
]


def run(way: str, group: Linears, x: Tensor) -> Tensor:
    return FORWARDS[way](x, group.weight, None, group.group.adapters, ROUTING)


def tokens_of(group: Linears, tokens: int, local: bool) -> Tensor:
    """Random x. With ``local``, eight neighbouring tokens choose the same two adapters by the first member's gate."""
    x = torch.randn(tokens, group.weight.shape[1], generator=torch.Generator("cuda").manual_seed(tokens), device="cuda")
    if local:
        runs = torch.arange(tokens, device="cuda") // 8
        x += 12.0 * group.ga[runs * 5 % 60].float() + 11.0 * group.ga[runs * 5 % 60 + 1].float()
    return x.to(group.weight.dtype)


@pytest.mark.parametrize("local", [False, True], ids=["uniform", "local"])
@pytest.mark.parametrize(
    ("way", "counts", "most"),
    [("few", (17, 100), 1.2), ("sorted_down", (65, 256), 1.2), ("sorted", (65, 256), 1.2), ("sorted_down", (513,), 1.6), ("sorted", (1030,), 1.6)],
)
@pytest.mark.parametrize(("adapters", "rank"), [(256, 8), (70, 64)])
@pytest.mark.parametrize(("widths", "hidden"), GROUPS)
@torch.no_grad()
def test_at_real_sizes(widths: tuple[int, ...], hidden: int, adapters: int, rank: int, way: str, counts: tuple[int, ...], most: float, local: bool) -> None:
    """The error is at most 20 % above that of the base if the base product is in float32, and at most 60 % above it if that is rounded."""
    group = Linears(adapters, rank, widths, hidden, torch.bfloat16)
    for tokens in counts:
        x = tokens_of(group, tokens, local)
        got = run(way, group, x)
        pick = torch.linspace(0, tokens - 1, 33, device="cuda").long()
        places, base, exact = group.exact(x[pick])
        own = error(F.linear(x[pick], group.weight)[:, places], base)
        assert error(got[pick][:, places], exact) <= most * own, tokens
        assert bool(got.isfinite().all())
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(way, group, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, got)


@pytest.mark.parametrize(("way", "tokens"), [("few", 64), ("sorted_down", 300), ("sorted", 300)])
@torch.no_grad()
def test_a_graph_replays_with_other_routes(way: str, tokens: int) -> None:
    group = Linears(256, 8, (4096, 1024, 1024), 4096, torch.bfloat16)
    inputs = [tokens_of(group, tokens, local) for local in (False, True)]
    wanted = [run(way, group, x) for x in inputs]
    x = inputs[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(way, group, x)
    for given, expected in zip(reversed(inputs), reversed(wanted), strict=True):
        x.copy_(given)
        for _ in range(20):
            graph.replay()
        assert torch.equal(output, expected)
