"""Decoding with chosen rows only against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import lora_mixture, plan, triton_chosen, triton_group
from meteora_kernels.stacked import gate_rows_of, pack
from meteora_kernels.triton_chosen import Tile, chosen_tile, decode_chosen, span
from meteora_kernels.triton_decode import new_flags
from meteora_kernels.triton_group import group_forward
from support.mixture_cases import Case, make
from support.nan_scratch import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = (3, 0, 8, 1, 5)
SMALL = Tile(3, 16, 16, 4, 16, 16, 16, 2, 2)
"""Steps and pieces so short that 72 columns are several, and that the last is cut short."""
TALL = Tile(5, 16, 32, 16, 16, 32, 32, 2, 3)
NAN = float("nan")


@dataclass
class Group:
    """The linears of a group, and what both ways of calling the kernel want of them."""

    cases: list[Case]
    weight: Tensor
    bias: Tensor | None
    ga: Tensor
    up: Tensor
    flags: Tensor
    ranks: tuple[int, ...]
    widths: tuple[int, ...]

    def run(self, tile: Tile | None = None, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
        case, rank = self.cases[0], sum(self.ranks)
        tensors = (case.x, self.weight, self.ga, self.up, self.bias, case.scaling, case.offsets, self.flags)
        sizes = (self.widths, rank, gate_rows_of(len(self.ranks)), max(self.ranks), top_k, temperature)
        found = decode_chosen(*tensors, *sizes, allowed, tile=tile)
        assert int(self.flags.abs().sum()) == 0
        return found

    def exact(self, top_k: int = 2, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
        """The reference's output in float64."""
        x = self.cases[0].x.double()
        base = F.linear(x, self.weight.double(), None if self.bias is None else self.bias.double()).split(self.widths, dim=-1)
        parts = []
        for part, case in zip(base, self.cases, strict=True):
            tensors = (case.gate.double(), case.lora_A.double(), case.lora_B.double(), self.cases[0].scaling, case.offsets)
            parts.append(lora_mixture(x, part, *tensors, top_k=top_k, temperature=temperature, allowed=allowed, backend="reference"))
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]

    def again(self) -> Group:
        """With what was written into the cases since."""
        ga, up = torch.cat([pack(case.gate, case.lora_A) for case in self.cases]), torch.cat([case.lora_B.reshape(-1) for case in self.cases])
        return replace(self, ga=ga, up=up)


def group(ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, tokens: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> Group:
    cases = [make(list(ranks), hidden, width, (tokens,), torch.float64, seed=seed, device=DEVICE) for seed, width in enumerate(widths)]
    for case in cases:
        case.lora_B *= 0.2
    cases = [case.copy(dtype) for case in cases]
    generator = torch.Generator().manual_seed(9)
    weight = (torch.randn(sum(widths), hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
    shift = torch.randn(sum(widths), generator=generator).to(DEVICE, dtype) if bias else None
    return Group(cases, weight, shift, weight, weight, new_flags(weight.device), ranks, widths).again()


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and scratch are NaN, and rows that do not exist, so that whatever is read or returned must have been written."""
    poison(monkeypatch, triton_chosen)


@pytest.mark.parametrize("tokens", [1, 5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "widths", "hidden", "top_k", "tile"),
    [
        pytest.param(MIXED, (24, 9, 33), 72, 2, None, id="mixed"),
        pytest.param(MIXED, (24, 9, 33), 72, 2, SMALL, id="mixed-small"),
        pytest.param(MIXED, (24, 9), 72, 2, TALL, id="mixed-tall"),
        pytest.param(MIXED, (40,), 20, 5, TALL, id="all-adapters"),
        pytest.param((0, 0, 0), (24, 9), 48, 2, SMALL, id="no-rows"),
        pytest.param((2,) * 40, (24, 9), 64, 3, TALL, id="40x2-top3"),
        pytest.param((64, 3), (33,), 72, 1, TALL, id="rank-64"),
        pytest.param((1,) * 300, (20,), 80, 16, TALL, id="300x1-top16", marks=pytest.mark.slow),
        pytest.param((256, 0), (20,), 33, 2, None, id="rank-256", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, top_k: int, tile: Tile | None, tokens: int) -> None:
    """Pieces that do not divide h, rows and outputs that do not fill a block, with a bias and a mask; twice the same bits."""
    given = group(ranks, widths, hidden, tokens, bias=tokens == 5)
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if tokens == 5 and top_k < 3 else None
    found = given.run(tile, top_k, 1.5, allowed)
    torch.testing.assert_close(found, given.exact(top_k, 1.5, allowed).float(), rtol=2e-4, atol=2e-4)
    assert torch.equal(given.run(tile, top_k, 1.5, allowed), found)


@pytest.mark.parametrize("tile", [SMALL, TALL], ids=["small", "tall"])
def test_rounds_once(tile: Tile) -> None:
    given = group(MIXED, (40, 24), 72, 16, torch.float16)
    exact = given.exact()

    def error(found: Tensor) -> float:
        return float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).median())

    assert error(given.run(tile)) <= 1.15 * error(exact.half())


def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    """Adapters 0 and 2 tie where the second column is 0; elsewhere 2 wins by less than float16 can tell."""
    given = group(MIXED, (24,), 72, 6, torch.float16)
    case = given.cases[0]
    case.x[:, 0] = 1.0
    case.x[:, 40] = torch.tensor([0.0, 1.0] * 3, device=DEVICE)
    case.gate[:] = 0.0
    case.gate[[0, 2], 0] = 4.0
    case.gate[2, 40] = 2.0**-10
    given = given.again()
    torch.testing.assert_close(given.run(SMALL, top_k=1).double(), given.exact(top_k=1), rtol=2e-3, atol=2e-3)


def test_nan_stays_in_its_token_and_in_its_adapter() -> None:
    """NaN in x makes one token NaN; in the rows of an adapter that nobody may choose, nothing, though ranks differ and places are left over."""
    given = group(MIXED, (24, 9), 72, 5)
    allowed = torch.arange(len(MIXED), device=DEVICE) != 0
    wanted = given.exact(allowed=allowed).float()
    for case in given.cases:
        case.lora_A[:3] = NAN
        case.lora_B[:3] = NAN
    given = given.again()
    torch.testing.assert_close(given.run(SMALL, allowed=allowed), wanted, rtol=2e-4, atol=2e-4)
    given.cases[0].x[1, 3] = NAN
    found = given.run(SMALL, allowed=allowed)
    assert bool(found[1].isnan().all())
    others = torch.arange(5) != 1
    torch.testing.assert_close(found[others], wanted[others], rtol=2e-4, atol=2e-4)


def test_group_takes_it_where_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 16 tokens, asked with what the choice depends on; the output is the other way's up to rounding."""
    given, asked, taken = group(MIXED, (24, 9), 72, 4), [], []
    case = given.cases[0]
    monkeypatch.setattr(triton_group, "decode_chosen", lambda *arguments: [taken.append(1), decode_chosen(*arguments)][1])
    outputs = []
    for answer in (True, False):
        monkeypatch.setattr(plan, "group_takes_chosen_rows", lambda *sizes, answer=answer: [asked.append(sizes), answer][1])
        packed = torch.cat([given.weight, given.ga])
        sizes = (list(given.widths), sum(MIXED), max(MIXED), 2, 1.0)
        outputs.append(group_forward(case.x, packed, given.up, None, case.scaling, case.offsets, None, given.flags, *sizes))
    assert asked == [(4, sum(MIXED), 2, max(MIXED))] * 2
    assert taken == [1]
    torch.testing.assert_close(*outputs, rtol=2e-4, atol=2e-4)


def test_spans_cover_the_columns_in_whole_steps() -> None:
    for hidden in (20, 72, 4096, 11008, 14336):
        tile = chosen_tile(hidden, 4096)
        for step in (tile.gate_step, tile.down_step, 16):
            columns = span(hidden, tile.pieces, step)
            assert columns % step == 0
            assert (tile.pieces - 1) * columns < hidden + tile.pieces * step
            assert columns * tile.pieces >= hidden
    assert [span(hidden, 4, 256) for hidden in (4096, 11008, 14336)] == [1024, 2816, 3584]
