"""Decoding with many adapters on a CUDA GPU, with all rows of A or only chosen ones: error at most 20 % above the base's, bit-equal, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meteora_kernels import Routing
from meteora_kernels.group import PATHS, run_group
from meteora_kernels.plan import Row
from meteora_kernels.plan.table import shipped
from support.gpu_groups import Linears, error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

GROUPS = [
    pytest.param((4096, 1024, 1024), 4096, id="qkv"),
    pytest.param((4096,), 4096, id="o"),
    pytest.param((14336, 14336), 4096, id="gate-up"),
    pytest.param((4096,), 14336, id="down"),
    pytest.param((1001, 777), 1000, id="odd"),
]


def row_of(path: str, group: Linears) -> Row:
    """The H100's row for these sizes."""
    facts = group.group.facts
    return next(row for row in shipped("h100").group if row.path == path and row.hidden.holds(facts.hidden) and row.outputs.holds(sum(facts.widths)))


@pytest.mark.parametrize("path", ["decode_all_rows", "decode_chosen_rows"])
@pytest.mark.parametrize(("adapters", "rank"), [(28, 8), (256, 8), (130, 16)])
@pytest.mark.parametrize(("widths", "hidden"), GROUPS)
@torch.no_grad()
def test_few_tokens_at_real_sizes(widths: tuple[int, ...], hidden: int, adapters: int, rank: int, path: str) -> None:
    for dtype, counts in ((torch.bfloat16, (1, 8, 16)), (torch.float16, (3,))):
        group = Linears(adapters, rank, widths, hidden, dtype)
        row = row_of(path, group)
        for tokens in counts:
            x = torch.randn(tokens, hidden, generator=torch.Generator("cuda").manual_seed(tokens), device="cuda").to(dtype)
            places, base, exact = group.exact(x)
            got = PATHS[path].run(x, group.group, Routing(), row)
            own = error(F.linear(x, group.weight)[:, places], base)
            assert error(got[:, places], exact) <= 1.2 * own, (dtype, tokens)
            assert bool(got.isfinite().all())
            assert torch.equal(PATHS[path].run(x, group.group, Routing(), row), got)
            assert int(group.group.flags.abs().sum()) == 0


@pytest.mark.parametrize("tokens", [1, 16])
@torch.no_grad()
def test_a_graph_replays_with_new_inputs(tokens: int) -> None:
    group = Linears(256, 8, (4096, 1024, 1024), 4096, torch.bfloat16).group
    first, second = (torch.randn(tokens, 4096, device="cuda").bfloat16() for _ in range(2))
    wanted = [run_group(x, group, Routing()) for x in (first, second)]
    x = first.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run_group(x, group, Routing())
    for given, expected in zip((second, first), reversed(wanted), strict=True):
        x.copy_(given)
        for _ in range(20):
            graph.replay()
        assert torch.equal(output, expected)
