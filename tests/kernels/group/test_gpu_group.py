"""Fused groups on a CUDA GPU, by the path of the table: error at most 20 % above the base's, two runs bit-equal, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Group, Routing, lora_mixture
from meteora_kernels.feed.rms_norm import rms_norm, rms_norm_reference
from meteora_kernels.feed.silu_mul import silu_mul, silu_mul_reference
from meteora_kernels.group import row_for, run_group
from meteora_kernels.stacked import pack
from meteora_kernels.wide import Wide
from support.mixture_cases import make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

RANKS = [8] * 28
CHECKED = 64
GROUPS = [
    pytest.param((512, 256, 256), 4096, id="qkv"),
    pytest.param((1024,), 4096, id="o"),
    pytest.param((8192, 8192), 4096, id="gate-up"),
    pytest.param((512,), 8192, id="down"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("widths", "hidden"), GROUPS)
@torch.no_grad()
def test_every_line_of_the_plan(widths: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    """Numbers of tokens on both sides of every limit, with x in place (and NaN around it) and with a contiguous x."""
    cases = [make(RANKS, hidden, width, (4097,), torch.float32, seed=seed, device="cuda") for seed, width in enumerate(widths)]
    for case in cases:
        case.lora_B *= 0.2
    cases = [case.copy(dtype) for case in cases]
    weight = (torch.randn(sum(widths), hidden, generator=torch.Generator().manual_seed(9)) * hidden**-0.5).to("cuda", dtype)
    rows = torch.cat([weight, *(pack(case.gate, case.lora_A) for case in cases)])
    wide, up = Wide(hidden, sum(RANKS), len(widths)), torch.cat([case.lora_B.reshape(-1) for case in cases])
    assert wide.pays(dtype)
    packed = wide.new_block(len(rows), rows)
    packed.copy_(rows)
    wide.place_up(packed, up, list(widths))
    group = Group.of(packed, Adapters.of_group(packed, up, cases[0].scaling, cases[0].offsets, widths, 8), has_up=True)
    some = torch.randperm(4097, generator=torch.Generator().manual_seed(1))[:CHECKED].cuda()
    for tokens in (3, 17, 65, 129, 256, 257, 513, 1025, 2049, 4097):
        x, pick = cases[0].x[:tokens], some % tokens
        few = x[pick].double()
        base = F.linear(few, weight.double()).split(widths, dim=1)
        exact = torch.cat(
            [
                lora_mixture(few, part, case.gate.double(), case.lora_A.double(), case.lora_B.double(), cases[0].scaling, case.offsets, backend="reference")
                for part, case in zip(base, cases, strict=True)
            ],
            dim=1,
        )  # type: ignore[arg-type]

        def error(got: Tensor, wanted: Tensor) -> float:
            return float(((got.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).median())

        own = error(F.linear(x, weight)[pick], torch.cat(base, dim=1))
        for in_place in (False, True):
            given, outputs = x, []
            for _ in range(2):
                if in_place:
                    given = wide.new_rows(tokens, x)
                    wide.whole(given).fill_(float("nan"))
                    given.copy_(x)
                outputs.append(run_group(given, group, Routing(), in_place=in_place))
            assert torch.equal(*outputs), (tokens, in_place)
            assert int(group.flags.abs().sum()) == 0, (tokens, in_place)
            assert bool(outputs[0].isfinite().all()), (tokens, in_place)
            row = row_for(group, tokens, 2, in_place=in_place, aligned=True)
            most = 1.6 if row.path == "split" or (row.path == "packed" and not row.pieces) else 1.2  # these two round twice
            assert error(outputs[0][pick], exact) <= most * own, (tokens, in_place, row, own)


@pytest.mark.parametrize("tokens", [300, 1000, 3000])
@torch.no_grad()
def test_a_token_keeps_its_nan(tokens: int) -> None:
    """A contiguous x is copied in the same launch, and the outputs of the other tokens are bit-equal."""
    case = make(RANKS, 4096, 1024, (tokens,), torch.bfloat16, seed=0, device="cuda")
    wide = Wide(4096, sum(RANKS), 1)
    weight = torch.randn(1024, 4096, device="cuda").bfloat16() * 4096**-0.5
    rows = torch.cat([weight, pack(case.gate, case.lora_A)])
    packed, up = wide.new_block(len(rows), rows), case.lora_B.reshape(-1)
    packed.copy_(rows)
    wide.place_up(packed, up, [1024])
    group = Group.of(packed, Adapters.of_group(packed, up, case.scaling, case.offsets, (1024,), 8), has_up=True)
    clean = run_group(case.x, group, Routing())
    x = case.x.clone()
    x[tokens // 2, 7] = float("nan")
    got = run_group(x, group, Routing())
    assert bool(got[tokens // 2].isnan().all())
    keep = torch.arange(tokens, device="cuda") != tokens // 2
    assert torch.equal(got[keep], clean[keep])


@pytest.mark.parametrize("tokens", [100, 300, 1500])
@torch.no_grad()
def test_graphs_replay_with_new_inputs(tokens: int) -> None:
    """A norm, a group in place, the activation and the next group are captured in one graph."""
    hidden, width = 1024, 512
    first, second = (make(RANKS, hidden, width, (tokens,), torch.bfloat16, seed=seed, device="cuda") for seed in (0, 1))
    last = make(RANKS, width, hidden, (tokens,), torch.bfloat16, seed=2, device="cuda")
    norm = torch.rand(hidden, device="cuda").bfloat16() + 0.5

    def group(cases: list, size: int, outs: tuple[int, ...]) -> tuple[Wide, Group]:
        wide = Wide(size, sum(RANKS), len(outs))
        weight = torch.randn(sum(outs), size, device="cuda").bfloat16() * size**-0.5
        rows = torch.cat([weight, *(pack(case.gate, case.lora_A) for case in cases)])
        packed, up = wide.new_block(len(rows), rows), torch.cat([case.lora_B.reshape(-1) for case in cases])
        packed.copy_(rows)
        wide.place_up(packed, up, list(outs))
        return wide, Group.of(packed, Adapters.of_group(packed, up, cases[0].scaling, cases[0].offsets, outs, 8), has_up=True)

    inner, one = group([first, second], hidden, (width, width))
    outer, two = group([last], width, (hidden,))
    x = first.x.clone()

    def work() -> Tensor:
        rows = inner.new_rows(tokens, x)
        rms_norm(x, norm, 1e-5, rows)
        gate, up = run_group(rows, one, Routing(), in_place=True).split(width, dim=1)
        middle = outer.new_rows(tokens, x)
        silu_mul(gate, up, middle)
        return run_group(middle, two, Routing(), in_place=True)

    wanted = work()
    x.neg_()
    other = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    for inputs, expected in ((second.x, None), (first.x, wanted), (-first.x, other)):
        x.copy_(inputs)
        graph.replay()
        assert expected is None or torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 4096), (2049, 4096), (33, 5120), (7, 576), (5, 16384)])
def test_norm_and_activation(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """The results are PyTorch's up to one rounding, for outputs with gaps between rows."""
    close = {"rtol": max(3 * torch.finfo(dtype).eps, 1e-5), "atol": 1e-6}
    x = torch.randn(tokens, 2 * hidden, device="cuda").to(dtype)
    weight = torch.rand(hidden, device="cuda").to(dtype) + 0.5
    memory = torch.full((tokens, hidden + 64), float("nan"), dtype=dtype, device="cuda")
    rms_norm(x[:, :hidden], weight, 1e-5, memory[:, 64:])
    torch.testing.assert_close(memory[:, 64:], rms_norm_reference(x[:, :hidden], weight, 1e-5), **close)
    silu_mul(x[:, :hidden], x[:, hidden:], memory[:, 64:])
    torch.testing.assert_close(memory[:, 64:], silu_mul_reference(x[:, :hidden], x[:, hidden:]), **close)
    assert bool(memory[:, :64].isnan().all())
