"""Groups of linears with random weights for the kernel tests, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Group, Routing, mix
from meteora_kernels.group import PATHS
from meteora_kernels.plan import Case, Row
from meteora_kernels.stacked import pack, stacked_rows_of
from meteora_kernels.tile import Tile
from meteora_kernels.types import Form
from meteora_kernels.wide import Wide
from support import mixture_cases
from support.mixture_cases import make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (3, 0, 8, 1, 5)
TILE = Tile(16, 32, 16, 4, 2)
"""Steps so short that 72 columns are several pieces."""
SPARE = 5
"""Rows that do not matter, at the end of the block."""


@dataclass
class Members:
    """The linears of a group.

    Attributes:
        cases: Every member's adapters, and x in the first.
        weight: (O, h), the base weights.
        group: What the kernels take.
        gap: Columns of NaN between the rows of the block.
        has_up: The block's rows hold B^T too.
    """

    cases: list[mixture_cases.Case]
    weight: Tensor
    bias: Tensor | None
    ranks: tuple[int, ...]
    gap: int
    has_up: bool
    group: Group

    @property
    def x(self) -> Tensor:
        return self.cases[0].x

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(case.lora_B.shape[1] for case in self.cases)

    @property
    def wide(self) -> Wide:
        return Wide(self.x.shape[1], sum(self.ranks), len(self.cases))

    def again(self) -> Members:
        """With what was written into the cases since."""
        return replace(self, group=packed_group(self.cases, self.weight, self.bias, self.gap, has_up=self.has_up))

    def exact(self, routing: Routing = Routing()) -> Tensor:
        """The reference's output in float64, of the weights as they are."""
        x = self.x.double()
        base = F.linear(x, self.weight.double(), None if self.bias is None else self.bias.double()).split(self.widths, dim=-1)
        first, parts = self.cases[0], []
        for part, case in zip(base, self.cases, strict=True):
            adapters = Adapters.of_layer(case.gate.double(), case.lora_A.double(), case.lora_B.double(), first.scaling, case.offsets)
            parts.append(mix(x, part, adapters, routing, backend="reference"))
        return torch.cat(parts, dim=-1)  # type: ignore[arg-type]

    def run(self, row: Row, routing: Routing = Routing(), *, in_place: bool = False) -> Tensor:
        """The output by a row's path, after asking whether it can run; x is a window of a buffer of NaN with ``in_place``. The flags are 0 again."""
        x = laid(self.x, self.wide) if in_place else self.x
        case = Case(self.group.facts, len(x), routing.top_k, in_place, aligned=self.group.aligned)
        path = PATHS[row.path]
        assert path.can_run(case, row) is None, path.can_run(case, row)
        found: Tensor = path.run(x, self.group, routing, row, Form(in_place))
        assert torch.equal(x.nan_to_num(7.0), self.x.nan_to_num(7.0))
        assert int(self.group.flags.abs().sum()) == 0
        assert (found.dtype, found.shape) == (x.dtype, (len(x), sum(self.widths)))
        return found


def members(
    widths: tuple[int, ...],
    tokens: int,
    *,
    ranks: tuple[int, ...] = RANKS,
    hidden: int = 72,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    gap: int = 0,
    has_up: bool = False,
) -> Members:
    """A group whose adapters' share is about a fifth of the output."""
    cases = [make(list(ranks), hidden, width, (tokens,), torch.float64, seed=seed, device=DEVICE) for seed, width in enumerate(widths)]
    for case in cases:
        case.lora_B *= 0.2
    cases = [case.copy(dtype) for case in cases]
    generator = torch.Generator().manual_seed(9)
    weight = (torch.randn(sum(widths), hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
    shift = torch.randn(sum(widths), generator=generator).to(DEVICE, dtype) if bias else None
    return Members(cases, weight, shift, ranks, gap, has_up, packed_group(cases, weight, shift, gap, has_up=has_up))


def packed_group(cases: list[mixture_cases.Case], weight: Tensor, bias: Tensor | None, gap: int, *, has_up: bool) -> Group:
    """The block of a group, which ends in rows that do not matter."""
    first, hidden = cases[0], weight.shape[1]
    widths = tuple(case.lora_B.shape[1] for case in cases)
    ga = torch.cat([pack(case.gate, case.lora_A) for case in cases])
    assert ga.shape[0] == stacked_rows_of(*first.gate.shape[:1], first.lora_A.shape[0]) * len(cases)
    rows = torch.cat([weight, ga, torch.ones(SPARE, hidden, device=weight.device, dtype=weight.dtype)])
    up = torch.cat([case.lora_B.reshape(-1) for case in cases])
    packed = F.pad(rows, (0, gap), value=float("nan"))[:, :hidden]
    if has_up:
        wide = Wide(hidden, first.lora_A.shape[0], len(cases))
        packed = wide.new_block(len(rows), rows)
        packed.copy_(rows)
        wide.place_up(packed, up, list(widths))
    max_rank = int(first.offsets.diff().max())
    return Group.of(packed, Adapters.of_group(packed, up, first.scaling.float(), first.offsets, widths, max_rank), bias, has_up=has_up)


def laid(x: Tensor, wide: Wide) -> Tensor:
    """x in a buffer whose other columns are NaN."""
    rows = wide.new_rows(x.shape[0], x)
    wide.whole(rows).fill_(float("nan"))
    return rows.copy_(x)


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Per token, relative."""
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


def check_bits(found: Tensor, again: Callable[[], Tensor]) -> None:
    """On a GPU, a second run gives the same bits. In the interpreter, programs run one after the other, so a second run would only repeat the first."""
    if DEVICE == "cuda":
        assert torch.equal(again(), found)


def check_rounded_once(given: Members, row: Row, routing: Routing = Routing(), *, in_place: bool = False, most: float = 1.2) -> Tensor:
    """The output is off by little more than one rounding of it, and two runs are bit-equal."""
    exact = given.exact(routing)
    found = given.run(row, routing, in_place=in_place)
    own = errors(exact.to(found.dtype), exact)
    assert float(errors(found, exact).max()) <= 3 * float(own.max())
    assert float(errors(found, exact).median()) <= most * float(own.median())
    check_bits(found, lambda: given.run(row, routing, in_place=in_place))
    return found


def check_equals_reference(given: Members, row: Row, routing: Routing = Routing(), *, in_place: bool = False) -> None:
    """In float32, the output is the reference's; two runs are bit-equal."""
    found = given.run(row, routing, in_place=in_place)
    torch.testing.assert_close(found, given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    check_bits(found, lambda: given.run(row, routing, in_place=in_place))


def check_ties(given: Members, row: Row) -> None:
    """Ties go to the lower index, and logits are not rounded."""
    given = ties(given)
    torch.testing.assert_close(given.run(row, Routing(1)).double(), given.exact(Routing(1)), rtol=2e-3, atol=2e-3)


def ties(given: Members) -> Members:
    """Adapters 0 and 2 tie for tokens of an even number; for the others 2 wins by less than float16 can tell. Column 1 must not be read otherwise."""
    case = given.cases[0]
    case.x[:, 0] = 1.0
    case.x[:, 1] = (torch.arange(len(case.x), device=DEVICE) % 2).to(case.x.dtype)
    case.gate[:] = 0.0
    case.gate[[0, 2], 0] = 4.0
    case.gate[2, 1] = 2.0**-10
    return given.again()


def nan_stays(given: Members, row: Row, *, in_adapter: bool = True) -> None:
    """NaN in x makes one token NaN; in the rows of an adapter that nobody may choose, nothing, though ranks differ and places are left over.

    Without ``in_adapter``, only the former is asked of the path: those that multiply all rows of B multiply NaN with 0.
    """
    allowed = torch.arange(len(given.ranks), device=DEVICE) != 0
    routing = Routing(allowed=allowed)
    wanted = given.exact(routing)
    for case in given.cases if in_adapter else []:
        case.lora_A[: given.ranks[0]] = float("nan")
        case.lora_B[: given.ranks[0]] = float("nan")
    given = given.again()
    close = {"rtol": 2e-4, "atol": 2e-4} if given.x.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(given.run(row, routing).double(), wanted, **close)
    given.x[1, 3] = float("nan")
    found = given.run(row, routing)
    assert bool(found[1].isnan().all())
    others = torch.arange(len(found)) != 1
    torch.testing.assert_close(found[others].double(), wanted[others], **close)
