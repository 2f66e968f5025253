"""The one-launch kernel for some dozens of tokens, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import lora_mixture, plan, triton_group, triton_stream
from meteora_kernels.stacked import gate_rows_of, pack, stacked_rows_of
from meteora_kernels.triton_decode import new_flags
from meteora_kernels.triton_group import group_forward
from meteora_kernels.triton_stream import can_stream, stream
from meteora_kernels.triton_sync import multiprocessors
from support.mixture_cases import Case, make
from support.nan_scratch import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = (64, 32, 16, 4, 3)
"""Steps so short that 72 columns are several pieces."""

needs_stream = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")


class Group:
    """Linears that share x; their weights in rows that are wider than h, and the adapters' share a fifth of the output."""

    def __init__(
        self,
        widths: tuple[int, ...],
        tokens: int,
        *,
        ranks: tuple[int, ...] = (3, 0, 8, 1, 5),
        hidden: int = 72,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        apart: int = 0,
    ) -> None:
        cases = [make(list(ranks), hidden, width, (tokens,), torch.float64, seed=seed, device=DEVICE) for seed, width in enumerate(widths)]
        for case in cases:
            case.lora_B *= 0.2
        self.cases: list[Case] = [case.copy(dtype) for case in cases]
        self.widths, self.rank, self.max_rank, self.count = list(widths), sum(ranks), max(ranks), len(ranks)
        self.gate_rows, self.stacked = gate_rows_of(self.count), stacked_rows_of(self.count, self.rank)
        generator = torch.Generator().manual_seed(9)
        self.weight = (torch.randn(sum(widths), hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
        self.bias = torch.randn(sum(widths), generator=generator).to(DEVICE, dtype) if bias else None
        rows = torch.cat([self.weight, *(pack(case.gate, case.lora_A) for case in self.cases), torch.ones(5, hidden, device=DEVICE, dtype=dtype)])
        self.packed = F.pad(rows, (0, apart), value=float("nan"))[:, :hidden]
        self.up = torch.cat([case.lora_B.reshape(-1) for case in self.cases])
        self.flags = new_flags(torch.device(DEVICE))
        self.x, self.scaling, self.offsets = self.cases[0].x, self.cases[0].scaling, self.cases[0].offsets

    def run(self, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None, pieces: int = 1, gate_pieces: int = 2, tile=TILE) -> Tensor:  # type: ignore[no-untyped-def]
        sizes = (self.widths, self.rank, self.gate_rows, self.stacked, top_k, temperature)
        return stream(self.x, self.packed, self.up, self.bias, self.scaling, self.offsets, self.flags, *sizes, allowed, tile, pieces, gate_pieces)

    def exact(self, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
        """The reference's output in float64, of the weights as they are."""
        base = F.linear(self.x.double(), self.weight.double(), None if self.bias is None else self.bias.double()).split(self.widths, dim=-1)
        parts = []
        for part, case in zip(base, self.cases, strict=True):
            tensors = (case.gate.double(), case.lora_A.double(), case.lora_B.double(), self.scaling, self.offsets)
            parts.append(lora_mixture(self.x.double(), part, *tensors, top_k=top_k, temperature=temperature, allowed=allowed, backend="reference"))
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and scratch are NaN beforehand, so that whatever is read or returned must have been written."""
    poison(monkeypatch, triton_stream)


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Per token, relative."""
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


def check(group: Group, **options: object) -> None:
    """Off by little more than one rounding of the output, the same twice, and the flags are 0 again."""
    routing = {name: options[name] for name in ("top_k", "temperature", "allowed") if name in options}
    exact = group.exact(**routing)  # type: ignore[arg-type]
    found = group.run(**options)  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (group.x.dtype, exact.shape)
    own = errors(exact.to(group.x.dtype), exact)
    assert float(errors(found, exact).max()) <= 2 * float(own.max())
    assert float(errors(found, exact).median()) <= 1.2 * float(own.median())
    assert torch.equal(group.run(**options), found)  # type: ignore[arg-type]
    assert int(group.flags.abs().sum()) == 0


@needs_stream
@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(("pieces", "gate_pieces"), [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(("widths", "tokens"), [((40,), 1), ((24, 41), 33), ((24, 9, 33), 64), ((24, 9, 33), 17)])
def test_stream_equals_its_members(widths: tuple[int, ...], tokens: int, pieces: int, gate_pieces: int, masked: bool) -> None:
    """Tiles that stick out of every member, sums in pieces of unequal length, rows that lie apart."""
    group = Group(widths, tokens, bias=masked, apart=24 if masked else 0)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    tile = (64, 64, 16, 4, 3) if pieces > 2 else TILE
    check(group, allowed=allowed, pieces=pieces, gate_pieces=gate_pieces, tile=tile, temperature=3.0 if masked else 1.0)


@needs_stream
@pytest.mark.parametrize(
    ("ranks", "top_k", "hidden"),
    [((1,), 1, 8), ((2, 70, 0), 3, 24), ((300, 20), 1, 24), ((4,) * 9, 8, 136), pytest.param((1,) * 300, 2, 64, marks=pytest.mark.slow)],
    ids=["one-adapter", "a-rank-above-h", "more-rows-than-a-chunk", "top-8", "many"],
)
def test_stream_takes_any_ranks(ranks: tuple[int, ...], top_k: int, hidden: int) -> None:
    check(Group((40, 24), 19, ranks=ranks, hidden=hidden), top_k=top_k, pieces=2, gate_pieces=2)


@needs_stream
@pytest.mark.parametrize(("tokens", "pieces"), [(17, 1), (32, 2), (100, 1), (128, 3)])
def test_stream_takes_other_blocks_of_tokens(tokens: int, pieces: int) -> None:
    check(Group((40, 24), tokens), pieces=pieces, tile=(32 if tokens <= 32 else 128, 64, 16, 4, 2))


@needs_stream
def test_stream_takes_bfloat16() -> None:
    if DEVICE == "cpu":
        pytest.skip("the interpreter computes in NumPy, which has no bfloat16")
    check(Group((200, 72), 64, dtype=torch.bfloat16, hidden=520), pieces=2, tile=(64, 64, 64, 4, 4))


@needs_stream
@pytest.mark.parametrize("pieces", [1, 2])
def test_nan_stays_in_its_token(pieces: int) -> None:
    group = Group((24, 9), 20)
    group.x[1, 3] = float("nan")
    found = group.run(pieces=pieces)
    assert found[1].isnan().all()
    assert not found[torch.arange(20) != 1].isnan().any()


@needs_stream
def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    """Adapters 0, 2 and 3 tie for the tokens that have no second column; with it, 2 wins by less than float16 can tell."""
    group = Group((24,), 18, ranks=(2, 2, 2, 2))
    case = group.cases[0]
    case.x[:, :2] = 1.0
    case.x[:9, 1] = 0.0
    case.gate[:] = 0.0
    case.gate[[0, 2, 3], 0] = 4.0
    case.gate[2, 1] = 2.0**-10
    group.packed[24 : 24 + 4] = case.gate
    check(group, top_k=1)


@needs_stream
def test_group_streams_where_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes the next line where it cannot: rows that are no multiple of 16 bytes, float32."""
    called = []
    monkeypatch.setattr(triton_group, "stream", lambda *arguments: [called.append(arguments[-3:]), stream(*arguments)][1])
    lines = (plan.GroupRule("stream", 17, 64, 2, TILE, 3), plan.GroupRule("packed", 17, plan.EVER))
    monkeypatch.setattr(plan, "GROUPS", lines)

    def far(group: Group) -> float:
        sizes = (group.widths, group.rank, group.max_rank, 2, 1.0)
        found = group_forward(group.x, group.packed, group.up, group.bias, group.scaling, group.offsets, None, group.flags, *sizes)
        return float(errors(found, group.exact()).max())

    assert far(Group((24, 9), 20)) < 5e-4
    assert called == [(TILE, 2, 3)]
    assert far(Group((24, 9), 65)) < 5e-3
    assert far(Group((24, 9), 20, hidden=20)) < 5e-3
    assert far(Group((24, 9), 20, dtype=torch.float32)) < 1e-5
    assert len(called) == 1


def test_rows_that_cannot_be_streamed() -> None:
    group = Group((24, 9), 20)
    sizes = (2, group.gate_rows, group.rank, TILE, 2)
    assert can_stream(group.x, group.packed, *sizes) == (DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0))
    assert not can_stream(group.x.float(), group.packed.float(), *sizes)
    assert not can_stream(group.x, group.packed[:, 1:], *sizes)
    assert not can_stream(group.x.t().contiguous().t(), group.packed, *sizes)
    assert not can_stream(group.x[:, :68].contiguous(), group.packed[:, :68].contiguous(), *sizes)


@pytest.mark.parametrize(("major", "processors", "expected"), [(9, 132, True), (9, 16, False), (9, 4, False), (8, 108, False), (10, 148, False)])
def test_gates_must_all_run_at_once(major: int, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their programs wait for each other: a part of a GPU with too few multiprocessors must not start them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, multi_processor_count=processors))
    monkeypatch.setattr(triton_stream, "torch", torch)
    monkeypatch.setattr(triton_stream, "multiprocessors", multiprocessors.__wrapped__)

    def tensor(*size: int) -> SimpleNamespace:
        return SimpleNamespace(dtype=torch.bfloat16, data_ptr=lambda: 256, stride=lambda axis: (4096, 1)[axis], device=torch.device("cuda:0"))

    assert can_stream(tensor(), tensor(), 2, 32, 224, (64, 128, 64, 4, 4), 8) is expected  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@needs_stream
@pytest.mark.parametrize(
    ("widths", "hidden", "tokens"),
    [
        ((4096, 1024, 1024), 4096, 64),
        ((4096,), 4096, 64),
        ((4096,), 14336, 64),
        ((8192, 8192), 1024, 64),
        ((1500, 777, 31), 1000, 37),
        ((576,), 1536, 33),
        ((4096, 1024, 1024), 4096, 17),
        ((4096,), 14336, 32),
        ((4096,), 14336, 100),
        ((8192, 8192), 1024, 128),
    ],
    ids=["qkv", "o", "down", "wide", "odd", "small", "qkv-17", "down-32", "down-100", "wide-128"],
)
def test_a_graph_replays_with_new_inputs(widths: tuple[int, ...], hidden: int, tokens: int) -> None:
    """As the plan has it, at sizes that fill the GPU; whatever order its programs run in, the output is the same."""
    group = Group(widths, tokens, ranks=(8,) * 28, hidden=hidden, dtype=torch.bfloat16, bias=hidden < 4096)
    sizes = (group.widths, group.rank, group.max_rank, 2, 1.0)

    def run() -> Tensor:
        return group_forward(group.x, group.packed, group.up, group.bias, group.scaling, group.offsets, None, group.flags, *sizes)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(5):
        group.x.copy_(torch.randn(group.x.shape, generator=torch.Generator().manual_seed(seed)))
        exact = group.exact()
        graph.replay()
        own = float(errors(exact.bfloat16(), exact).median())
        assert float(errors(found, exact).median()) <= 1.2 * own
        first = found.clone()
        for _ in range(10):
            graph.replay()
            assert torch.equal(found, first)
    assert int(group.flags.abs().sum()) == 0
