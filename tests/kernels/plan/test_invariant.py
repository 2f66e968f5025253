"""Batch invariance: a token's output of a fused group has the same bits alone, in batches of up to 128 tokens, and at every place in them."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing, batch_invariance, plan, run_group
from meteora_kernels.group import row_for
from support.kernel_groups import check_bits, errors, members
from support.kernel_rows import DEVICE

COUNTS = [1, 2, 7, 16, 17, 33, 64, 65, 100, 127, 128] if torch.cuda.is_available() else [1, 17, 65]
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if torch.cuda.is_available() else [torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [2, 3] if torch.cuda.is_available() else [3])
def test_tokens_do_not_depend_on_their_batch(dtype: torch.dtype, top_k: int) -> None:
    given = members((24, 9), 128 if torch.cuda.is_available() else 65, bias=True, dtype=dtype)
    routing = Routing(top_k, 1.5)
    with torch.no_grad(), batch_invariance(DEVICE):
        together = run_group(given.x, given.group, routing)
        for count in COUNTS:
            for start in {0, len(given.x) - count}:
                some = given.x[start : start + count].contiguous()
                assert torch.equal(run_group(some, given.group, routing), together[start : start + count]), (count, start)
        order = torch.randperm(len(given.x), generator=torch.Generator().manual_seed(0)).to(given.x.device)
        assert torch.equal(run_group(given.x[order], given.group, routing), together[order])
        check_bits(together, lambda: run_group(given.x, given.group, routing))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
def test_every_number_of_rows_at_real_sizes() -> None:
    """1 to 128 rows of q, k and v of Llama-3-8B with 28 adapters, at the start and at the end of a batch, and in a CUDA graph."""
    from support.gpu_groups import Linears

    group = Linears(28, 8, (4096, 1024, 1024), 4096, torch.bfloat16).group
    x = torch.randn(128, 4096, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    with batch_invariance(DEVICE):
        together = run_group(x, group, Routing())
        for count in range(1, 129):
            assert torch.equal(run_group(x[:count], group, Routing()), together[:count]), count
            assert torch.equal(run_group(x[128 - count :], group, Routing()), together[128 - count :]), count
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_group(x[:7], group, Routing())
        graph.replay()
        assert torch.equal(captured, together[:7])


def test_the_mode_is_as_exact_and_ends_with_its_block() -> None:
    given = members((24, 9), 20, bias=True, dtype=torch.float16)
    before = plan.table_of(DEVICE)
    with torch.no_grad(), batch_invariance(DEVICE):
        assert {row_for(given.group, tokens, 2).way for tokens in (1, 16, 64, 4096)} == {"invariant"}
        assert float(errors(run_group(given.x, given.group, Routing()), given.exact()).max()) < 5e-3
    assert plan.table_of(DEVICE) is before
    assert row_for(given.group, 1, 2).way != "invariant"
