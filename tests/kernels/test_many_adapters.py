"""Chosen rows of many adapters against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Routing, lora_mixture, many_adapters, plan
from meteora_kernels.many_adapters import can_run, few_forward, launch, reference, sorted_forward
from meteora_kernels.stacked import gate_rows_of, pack
from meteora_kernels.triton_decode import new_flags
from meteora_kernels.triton_group import group_forward
from support.mixture_cases import Case, make
from support.nan_scratch import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = (3, 0, 8, 1, 5)
NAN = float("nan")
WAYS = [pytest.param(few_forward, id="few"), pytest.param(sorted_forward, id="sorted")]
Way = Callable[[Tensor, Tensor, Tensor | None, Adapters, Routing], Tensor]


@dataclass
class Group:
    """The linears of a group."""

    cases: list[Case]
    weight: Tensor
    bias: Tensor | None
    ranks: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def adapters(self) -> Adapters:
        ga = torch.cat([pack(case.gate, case.lora_A) for case in self.cases])
        up = torch.cat([case.lora_B.reshape(-1) for case in self.cases])
        case, stacked = self.cases[0], ga.shape[0] // len(self.cases)
        return Adapters(ga, ga[gate_rows_of(len(self.ranks)) :], up, case.scaling.float(), case.offsets, max(self.ranks), self.widths, stacked)

    def run(self, way: Way, routing: Routing) -> Tensor:
        return way(self.cases[0].x, self.weight, self.bias, self.adapters, routing)

    def exact(self, routing: Routing) -> Tensor:
        """The reference's output in float64."""
        x = self.cases[0].x.double()
        base = F.linear(x, self.weight.double(), None if self.bias is None else self.bias.double()).split(self.widths, dim=-1)
        options = {"top_k": routing.top_k, "temperature": routing.temperature, "allowed": routing.allowed, "backend": "reference"}
        parts = []
        for part, case in zip(base, self.cases, strict=True):
            tensors = (case.gate.double(), case.lora_A.double(), case.lora_B.double(), self.cases[0].scaling, case.offsets)
            parts.append(lora_mixture(x, part, *tensors, **options))  # type: ignore[arg-type]
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]


def group(ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, tokens: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> Group:
    cases = [make(list(ranks), hidden, width, (tokens,), torch.float64, seed=seed, device=DEVICE) for seed, width in enumerate(widths)]
    for case in cases:
        case.lora_B *= 0.2
    cases = [case.copy(dtype) for case in cases]
    generator = torch.Generator().manual_seed(9)
    weight = (torch.randn(sum(widths), hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
    shift = torch.randn(sum(widths), generator=generator).to(DEVICE, dtype) if bias else None
    return Group(cases, weight, shift, ranks, widths)


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and scratch hold NaN or a large number at first, so that whatever is read or returned must have been written."""
    poison(monkeypatch, launch, many_adapters)


@pytest.mark.parametrize(
    ("way", "ranks", "widths", "hidden", "tokens", "top_k"),
    [
        pytest.param(few_forward, MIXED, (17, 9, 5), 24, 3, 2, id="few-mixed"),
        pytest.param(few_forward, (20, 3), (9,), 18, 2, 2, id="few-rank-20"),
        pytest.param(few_forward, (0, 0), (5,), 16, 1, 1, id="few-no-rows"),
        pytest.param(sorted_forward, MIXED, (17, 9, 5), 24, 3, 2, id="sorted-mixed"),
        pytest.param(sorted_forward, (20, 3), (9,), 18, 5, 2, id="sorted-rank-20"),
        pytest.param(sorted_forward, (0, 0), (5,), 16, 1, 1, id="sorted-no-rows"),
        pytest.param(sorted_forward, (2,) * 6, (5,), 20, 19, 3, id="sorted-top3"),
        pytest.param(few_forward, (2,) * 40, (24, 300), 300, 70, 3, id="few-many", marks=pytest.mark.slow),
        pytest.param(sorted_forward, (2,) * 40, (24, 300), 300, 300, 3, id="sorted-many", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(way: Way, ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, tokens: int, top_k: int) -> None:
    """Sizes that fill no tile, with a bias and a mask; twice the same bits."""
    given = group(ranks, widths, hidden, tokens, bias=tokens == 3)
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if tokens == 3 else None
    routing = Routing(top_k, 1.5, allowed)
    found = given.run(way, routing)
    torch.testing.assert_close(found, given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    assert tokens > 5 or torch.equal(given.run(way, routing), found)


def test_sums_over_columns_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a block adds the pieces up; h fills neither a step nor a piece."""
    monkeypatch.setattr(launch, "DOWN_TILE", (32, 1, 2, 1 << 20))
    given, routing = group(MIXED, (5,), 262, 2), Routing(2, 1.0)
    taken: list[int] = []
    plain = launch.pieces_of
    monkeypatch.setattr(launch, "pieces_of", lambda *sizes: taken.append(plain(*sizes)) or taken[-1])
    torch.testing.assert_close(given.run(sorted_forward, routing), given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    assert taken[-1] == 2


@pytest.mark.parametrize("way", WAYS)
def test_rounds_once_in_16_bits(way: Way) -> None:
    given, routing = group(MIXED, (24,), 24, 3, torch.float16), Routing(2, 1.0)
    exact = given.exact(routing)

    def error(found: Tensor) -> float:
        return float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).median())

    assert error(given.run(way, routing)) <= 1.15 * error(exact.half())


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_token_and_in_its_adapter(way: Way) -> None:
    """NaN in x makes one token NaN; in the rows of an adapter that nobody may choose, nothing, though ranks differ and places are left over."""
    given = group(MIXED, (9,), 20, 3)
    routing = Routing(2, 1.0, torch.arange(len(MIXED), device=DEVICE) != 0)
    wanted = given.exact(routing).float()
    for case in given.cases:
        case.lora_A[:3] = NAN
        case.lora_B[:3] = NAN
    torch.testing.assert_close(given.run(way, routing), wanted, rtol=2e-4, atol=2e-4)
    given.cases[0].x[1, 3] = NAN
    found = given.run(way, routing)
    assert bool(found[1].isnan().all())
    others = torch.arange(3) != 1
    torch.testing.assert_close(found[others], wanted[others], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_the_lower_index_and_logits_are_not_rounded(way: Way) -> None:
    """Adapters 0 and 2 tie where the second column is 0; elsewhere 2 wins by less than float16 can tell."""
    given, routing = group(MIXED, (9,), 20, 2, torch.float16), Routing(1, 1.0)
    case = given.cases[0]
    case.x[:, 0] = 1.0
    case.x[:, 10] = torch.tensor([0.0, 1.0], device=DEVICE)
    case.gate[:] = 0.0
    case.gate[[0, 2], 0] = 4.0
    case.gate[2, 10] = 2.0**-10
    torch.testing.assert_close(given.run(way, routing).double(), given.exact(routing), rtol=2e-3, atol=2e-3)


def test_tokens_are_sorted_into_blocks_of_one_adapter() -> None:
    """Every token once in each slot, in order, in blocks that do not overlap; many tokens for one adapter and none for another."""
    count, tokens, slots = 7, 45, 2
    picks = torch.randint(0, count, (tokens, slots), generator=torch.Generator().manual_seed(1)) % 6
    picks[:24, 0] = 5
    picks[:, 1] = torch.where(picks[:, 0] == picks[:, 1], 6, picks[:, 1])
    logits = torch.zeros(tokens, count).scatter_(1, picks, torch.tensor([2.0, 1.0]).expand(tokens, 2).contiguous()).to(DEVICE)
    unit = torch.zeros(1, device=DEVICE)
    adapters = Adapters(unit, unit, unit, torch.ones(count, device=DEVICE), torch.arange(count + 1, device=DEVICE), 1, (1,))
    found = launch.sort_tokens(logits, adapters, Routing(slots, 1.0))
    shares = torch.softmax(torch.tensor([2.0, 1.0]), 0)
    for slot in range(slots):
        wanted = reference.sorted_by_adapter(picks[:, slot], count)
        assert torch.equal(found.order[slot].cpu().long(), torch.cat(wanted))
        torch.testing.assert_close(found.factors[slot].cpu(), shares[slot].expand(tokens))
        for table, size in ((found.table, launch.SIZE), (found.short_table, launch.SHORT)):
            blocks: list[list[int]] = [[] for _ in range(count)]
            for owner, begin, end, first, last, counter in zip(*table[:, slot].tolist(), strict=True):
                assert counter == 0
                if owner >= 0:
                    assert 0 < end - begin <= size
                    assert (first, last) == (owner, owner + 1)
                    blocks[owner] += found.order[slot, begin:end].tolist()
            assert blocks == [tokens.tolist() for tokens in wanted]


def test_the_middle_is_the_reference_s() -> None:
    given, routing = group(MIXED, (9,), 24, 4), Routing(2, 1.0)
    case, adapters = given.cases[0], given.adapters
    found = launch.sort_tokens(launch.gate_sums(case.x, adapters), adapters, routing)
    middle = launch.blocks_down(case.x, found, adapters, 2)
    order = (case.x @ case.gate.t()).topk(2, dim=1).indices
    for slot in range(2):
        wanted = reference.middle_of(case.x, case.lora_A, order[:, slot], found.factors[slot], case.offsets, adapters.rank_p)
        torch.testing.assert_close(middle[slot], wanted, rtol=2e-4, atol=2e-4)


def test_says_what_it_cannot_do() -> None:
    adapters = group((3, 300), (9,), 16, 2).adapters
    assert "largest rank is 300" in (can_run(adapters, Routing(1, 1.0), torch.float16) or "")
    assert "up to 16" in (can_run(adapters, Routing(17, 1.0), torch.float16) or "")
    assert "not float64" in (can_run(adapters, Routing(1, 1.0), torch.float64) or "")
    assert can_run(group(MIXED, (9,), 16, 2).adapters, Routing(2, 1.0), torch.bfloat16) is None


@pytest.mark.parametrize("way", ["few", "sorted"])
def test_the_plan_s_way_is_taken_by_groups_and_by_layers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 17 tokens on, where the table says so; what the kernels cannot do goes on to products with all rows."""
    monkeypatch.setattr(plan, "MANY", tuple(plan.ManyRule(way, 17, plan.EVER, 0, fused) for fused in (True, False)))
    monkeypatch.setattr(plan, "GROUPED_GAIN", 1)
    given, routing = group((1,) * 4, (5,), 16, 17, bias=True), Routing(1, 1.0)
    case, adapters, taken = given.cases[0], given.adapters, []
    plain = many_adapters.FORWARDS[way]
    monkeypatch.setitem(many_adapters.FORWARDS, way, lambda *arguments: [taken.append(way), plain(*arguments)][1])
    packed = torch.cat([given.weight, adapters.gate])
    tensors = (case.x, packed, adapters.lora_B, given.bias, case.scaling.float(), case.offsets, None, new_flags(packed.device))
    found = group_forward(*tensors, [5], 4, 1, 1, 1.0)
    torch.testing.assert_close(found, given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    assert taken == [way]
    mixed = lora_mixture(*case.arguments, top_k=1, backend="triton")
    exact = lora_mixture(*case.copy(torch.float64).arguments, top_k=1, backend="reference")
    torch.testing.assert_close(mixed, exact.float(), rtol=2e-4, atol=2e-4)  # type: ignore[union-attr]
