"""Decoding with many adapters on a CUDA GPU, all rows of A and chosen rows only: at most 20 % above the base's own error, bit-equal, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meteora_kernels.triton_chosen import decode_chosen
from meteora_kernels.triton_decode import decode
from support.gpu_groups import Group, error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

GROUPS = [
    pytest.param((4096, 1024, 1024), 4096, id="qkv"),
    pytest.param((4096,), 4096, id="o"),
    pytest.param((14336, 14336), 4096, id="gate-up"),
    pytest.param((4096,), 14336, id="down"),
    pytest.param((1001, 777), 1000, id="odd"),
]


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
