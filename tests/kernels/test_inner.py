"""The launch before a wide product, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from meteora_kernels import plan, reference, triton_group, triton_inner
from meteora_kernels.stacked import gate_rows_of, pack, stacked_rows_of
from meteora_kernels.triton_decode import new_flags
from meteora_kernels.triton_group import group_forward
from meteora_kernels.triton_inner import can_inner, inner
from meteora_kernels.triton_middle import ranks_of
from meteora_kernels.triton_sync import multiprocessors
from meteora_kernels.wide import Wide
from support.kernel_groups import DEVICE, TILE, laid, members, use, widened
from support.mixture_cases import make

needs_copy_engine = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")
pytestmark = needs_copy_engine


class Case:
    """Gates and A of some members, x, and what the launch writes."""

    def __init__(self, members: int, tokens: int, ranks: tuple[int, ...] = (3, 0, 8, 1, 5), hidden: int = 72, dtype: torch.dtype = torch.float16) -> None:
        self.cases = [make(list(ranks), hidden, 8, (tokens,), torch.float64, seed=seed, device=DEVICE).copy(dtype) for seed in range(members)]
        self.rank, self.max_rank, self.count = sum(ranks), max(ranks), len(ranks)
        self.wide = Wide(hidden, self.rank, members)
        self.gate_rows, self.stacked = gate_rows_of(self.count), stacked_rows_of(self.count, self.rank)
        rows = torch.cat([pack(case.gate, case.lora_A) for case in self.cases])
        self.ga = self.wide.new_block(len(rows), rows)
        self.ga.copy_(rows)
        self.x, self.scaling, self.offsets = self.cases[0].x, self.cases[0].scaling, self.cases[0].offsets
        self.flags = new_flags(self.x.device)

    def run(self, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None, tile=TILE, pieces: int = 2, copied: bool = True) -> Tensor:  # type: ignore[no-untyped-def]
        """The whole buffer, NaN beforehand."""
        wide = self.wide
        rows = laid(self.x, wide)
        buffer = wide.whole(rows)
        if copied:
            buffer.fill_(float("nan"))
        sizes = (len(self.cases), self.rank, self.max_rank, self.gate_rows, self.stacked, top_k, temperature, allowed)
        inner(
            self.x if copied else rows,
            self.ga,
            self.scaling,
            self.offsets,
            self.flags,
            *sizes,
            (buffer, *wide.places, wide.pad),
            tile,
            pieces,
            rows if copied else None,
        )
        assert int(self.flags.abs().sum()) == 0
        assert torch.equal(rows.nan_to_num(7.0), self.x.nan_to_num(7.0))
        return buffer

    def h(self, buffer: Tensor) -> Tensor:
        """(M, members, columns of one)."""
        places = [self.wide.places[0], *(self.wide.places[1] + index * self.wide.pad for index in range(len(self.cases) - 1))]
        return torch.stack([buffer[:, place : place + self.wide.pad] for place in places], dim=1)

    def exact(self, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
        """The same in float64."""
        x, parts = self.x.double(), []
        owners = torch.repeat_interleave(torch.arange(self.count, device=DEVICE), self.offsets.diff())
        for case in self.cases:
            indices, weights = reference.route(x @ case.gate.double().t(), top_k, temperature, allowed)
            factors = torch.zeros(len(x), self.count, dtype=torch.float64, device=DEVICE).scatter_add_(1, indices, weights.double()) * self.scaling.double()
            found = x @ case.lora_A.double().t() * factors[:, owners]
            parts.append(torch.nn.functional.pad(torch.where(factors[:, owners] == 0, 0.0, found), (0, self.wide.pad - self.rank)))
        return torch.stack(parts, dim=1)


def check(case: Case, **options: object) -> None:
    """Off by one rounding, zeros where the reference has them, the same twice."""
    routing = {name: options[name] for name in ("top_k", "temperature", "allowed") if name in options}
    exact = case.exact(**routing)  # type: ignore[arg-type]
    buffer = case.run(**options)  # type: ignore[arg-type]
    assert torch.equal(case.run(**options), buffer)  # type: ignore[arg-type]
    torch.testing.assert_close(case.h(buffer).double(), exact, rtol=2e-3 if buffer.dtype == torch.float16 else 1e-2, atol=2e-4)


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "in-place"])
@pytest.mark.parametrize(("members", "tokens", "tile", "pieces"), [(3, 37, TILE, 2), (1, 21, TILE, 3), (2, 16, (32, 64, 16, 4, 2), 1)])
def test_inner_routes_and_lays_out(members: int, tokens: int, tile: tuple[int, int, int, int, int], pieces: int, copied: bool) -> None:
    check(Case(members, tokens), tile=tile, pieces=pieces, copied=copied)


@pytest.mark.parametrize(
    ("ranks", "top_k", "hidden"), [((1,) * 33, 1, 8), ((2, 30, 0, 11), 1, 24), ((4,) * 40, 8, 136)], ids=["rank-1", "a-rank-above-h", "top-8"]
)
def test_inner_takes_any_ranks(ranks: tuple[int, ...], top_k: int, hidden: int) -> None:
    check(Case(2, 19, ranks, hidden), top_k=top_k, temperature=3.0)


def test_inner_with_few_allowed() -> None:
    """Fewer than top-k: one adapter fills two slots, and counts once."""
    for permitted in ([True, False, True, False, True], [True, False, False, False, False], [False, False, False, False, True]):
        check(Case(2, 19), allowed=torch.tensor(permitted, device=DEVICE))


def test_nan_stays_in_its_token() -> None:
    case = Case(2, 37)
    clean = case.run()
    case.x[5, 3] = float("nan")
    buffer = case.run()
    others = torch.arange(37, device=DEVICE) != 5
    assert torch.equal(buffer[others], clean[others])
    assert bool(case.h(buffer)[5].isnan().any())


def test_group_asks_whether_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line's tile and pieces; x is copied where it does not lie in place; where it cannot run, the next line does."""
    group, wide = widened(members((24, 9), 20, False, torch.float16))
    called = []
    monkeypatch.setattr(triton_group, "inner", lambda *given: [called.append(given[-3:]), inner(*given)][1])
    use(monkeypatch, "wide", 0, TILE, 3)
    monkeypatch.setattr(plan, "GROUPS", (*plan.GROUPS, plan.GroupRule("split", 17, plan.EVER)))
    x, *others = group.arguments()
    outputs = [group_forward(x, *others, beside=True), group_forward(laid(group.x, wide), *others, beside=True, in_place=True)]  # type: ignore[arg-type]
    assert torch.equal(*outputs)
    assert [given[:2] for given in called] == [(TILE, 3)] * 2
    assert [given[2] is None for given in called] == [False, True]
    far = torch.cat([group.x, group.x], dim=1)[:, 1:73]  # not 16 bytes aligned
    assert group_forward(far, *others, beside=True).shape == outputs[0].shape  # type: ignore[arg-type]
    assert len(called) == 2


@pytest.mark.parametrize(("major", "processors", "expected"), [(9, 132, True), (9, 16, True), (9, 15, False), (8, 108, False), (10, 148, False)])
def test_those_that_wait_run_at_once(major: int, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, multi_processor_count=processors))
    monkeypatch.setattr(triton_inner, "multiprocessors", multiprocessors.__wrapped__)

    def rows(hidden: int = 4096, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
        return SimpleNamespace(dtype=dtype, data_ptr=lambda: 256, stride=lambda axis: (hidden, 1)[axis], device=torch.device("cuda:0"))

    tile = (64, 128, 64, 4, 4)
    assert can_inner(rows(), 512, 1, 256, 8, tile, 8) is expected  # type: ignore[arg-type]
    assert not can_inner(rows(4100), 512, 1, 256, 8, tile, 8)  # type: ignore[arg-type]
    assert not can_inner(rows(dtype=torch.float32), 512, 1, 256, 8, tile, 8)  # type: ignore[arg-type]
    assert not can_inner(rows(), 512, 1, 256, 0, tile, 8)  # type: ignore[arg-type]
    assert not can_inner(rows(), 64 * 512 + 1, 1, 256, 8, tile, 8)  # type: ignore[arg-type]


def test_chosen_rows_are_few() -> None:
    assert [ranks_of(8, 2, 256), ranks_of(5, 3, 256), ranks_of(64, 2, 256), ranks_of(65, 2, 256), ranks_of(0, 2, 256)] == [8, 8, 64, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [257, 512, 1000, 4096, 8191])
def test_the_copy_is_exact(tokens: int) -> None:
    """Full-size tiles as the plan has them for o, many times, beside what runs at the same time; NaN beforehand."""
    case = Case(1, tokens, (8,) * 28, 4096, torch.bfloat16)
    lines = [rule for rule in plan.GROUPS if rule.routes and rule.least_tokens <= tokens <= rule.most_tokens]
    assert lines
    for rule in lines:
        exact = case.exact()
        for seed in range(10):
            buffer = case.run(tile=rule.tile, pieces=rule.gate_pieces)
            if seed == 0:
                first = buffer
                errors = (case.h(buffer).double() - exact).norm(dim=2) / exact.norm(dim=2)
                assert float(errors.median()) < 2e-3
                assert int((errors > 1e-2).sum()) <= 2  # ties that float32 cannot tell apart
            assert torch.equal(buffer, first)
