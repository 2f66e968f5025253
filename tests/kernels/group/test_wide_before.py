"""The launch before the product of the wide path, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from meteora_kernels import Routing, reference
from meteora_kernels.group import row_for, run_group
from meteora_kernels.group import wide as wide_path
from meteora_kernels.plan import Case, Row, machine
from meteora_kernels.plan.table import shipped
from meteora_kernels.steps.middle import Out, ranks_of
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, Members, check_bits, laid, members
from support.kernel_rows import taking

TILE = Tile(16, 32, 16, 4, 2)
"""A row with steps so short that 72 columns are several pieces, and with tiles that do not hold all rows."""
ROW = Row("wide", gate_pieces=2, tile=TILE)

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")


def linears(count: int, tokens: int, ranks: tuple[int, ...] = (3, 0, 8, 1, 5), hidden: int = 72, dtype: torch.dtype = torch.float16) -> Members:
    return members((8,) * count, tokens, ranks=ranks, hidden=hidden, dtype=dtype, has_up=True)


def write(given: Members, row: Row = ROW, routing: Routing = Routing(), *, copied: bool = True) -> Tensor:
    """The whole buffer, which is filled with NaN first."""
    wide = given.wide
    rows = laid(given.x, wide)
    buffer = wide.whole(rows)
    if copied:
        buffer.fill_(float("nan"))
    assert wide_path.can_launch_before(Case(given.group.facts, len(rows), routing.top_k, aligned=True), row) is None
    wide_path.launch_before(given.x if copied else rows, given.group, routing, row, Out(buffer, *wide.places, wide.pad), rows if copied else None)
    assert int(given.group.flags.abs().sum()) == 0
    assert torch.equal(rows.nan_to_num(7.0), given.x.nan_to_num(7.0))
    return buffer


def h_of(given: Members, buffer: Tensor) -> Tensor:
    """The columns of h (M, members, columns of one member)."""
    wide = given.wide
    places = [wide.places[0], *(wide.places[1] + index * wide.pad for index in range(len(given.cases) - 1))]
    return torch.stack([buffer[:, place : place + wide.pad] for place in places], dim=1)


def exact(given: Members, routing: Routing = Routing()) -> Tensor:
    """The same in float64."""
    x, scaling, offsets, parts = given.x.double(), given.group.adapters.scaling, given.group.adapters.offsets, []
    count = len(scaling)
    owners = torch.repeat_interleave(torch.arange(count, device=DEVICE), offsets.diff())
    for case in given.cases:
        indices, weights = reference.route(x @ case.gate.double().t(), routing.top_k, routing.temperature, routing.allowed)
        factors = torch.zeros(len(x), count, dtype=torch.float64, device=DEVICE).scatter_add_(1, indices, weights.double()) * scaling.double()
        found = x @ case.lora_A.double().t() * factors[:, owners]
        parts.append(torch.nn.functional.pad(torch.where(factors[:, owners] == 0, 0.0, found), (0, given.wide.pad - sum(given.ranks))))
    return torch.stack(parts, dim=1)


def check(given: Members, row: Row = ROW, routing: Routing = Routing(), *, copied: bool = True) -> None:
    """The error is one rounding, zeros are those of the reference, and two runs are bit-equal."""
    buffer = write(given, row, routing, copied=copied)
    check_bits(buffer, lambda: write(given, row, routing, copied=copied))
    torch.testing.assert_close(h_of(given, buffer).double(), exact(given, routing), rtol=2e-3 if buffer.dtype == torch.float16 else 1e-2, atol=2e-4)


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "in-place"])
@pytest.mark.parametrize(("count", "tokens", "tile", "pieces"), [(3, 37, TILE, 2), (1, 21, TILE, 3), (2, 16, Tile(32, 64, 16, 4, 2), 1)])
def test_routes_and_lays_out(count: int, tokens: int, tile: Tile, pieces: int, copied: bool) -> None:
    check(linears(count, tokens), Row("wide", gate_pieces=pieces, tile=tile), copied=copied)


@pytest.mark.parametrize(
    ("ranks", "top_k", "hidden"), [((1,) * 33, 1, 8), ((2, 30, 0, 11), 1, 24), ((4,) * 40, 8, 136)], ids=["rank-1", "a-rank-above-h", "top-8"]
)
def test_takes_any_ranks(ranks: tuple[int, ...], top_k: int, hidden: int) -> None:
    check(linears(2, 19, ranks, hidden), routing=Routing(top_k, 3.0))


def test_with_few_allowed() -> None:
    """With fewer allowed adapters than top-k, one adapter fills two slots and is applied once."""
    for permitted in ([True, False, True, False, True], [True, False, False, False, False], [False, False, False, False, True]):
        check(linears(2, 19), routing=Routing(allowed=torch.tensor(permitted, device=DEVICE)))


def test_nan_stays_in_its_token() -> None:
    given = linears(2, 37)
    clean = write(given)
    given.x[5, 3] = float("nan")
    buffer = write(given)
    others = torch.arange(37, device=DEVICE) != 5
    assert torch.equal(buffer[others], clean[others])
    assert bool(h_of(given, buffer)[5].isnan().any())


def test_groups_take_it_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """x is copied if it is not in place, and the next row is used if the launch cannot run."""
    given = members((24, 9), 20, dtype=torch.float16, has_up=True)
    called: list[bool] = []
    run = wide_path.launch_before
    monkeypatch.setattr(wide_path, "launch_before", lambda *arguments: [called.append(arguments[-1] is None), run(*arguments)][1])
    with taking(Row("wide", gate_pieces=3, tile=TILE), Row("split")):
        outputs = [run_group(given.x, given.group, Routing()), run_group(laid(given.x, given.wide), given.group, Routing(), in_place=True)]
        assert torch.equal(*outputs)
        assert called == [False, True]
        far = torch.cat([given.x, given.x], dim=1)[:, 1:73]  # not aligned to 16 bytes
        assert run_group(far, given.group, Routing()).shape == outputs[0].shape
        assert row_for(given.group, 20, 2).path == "split"
    assert len(called) == 2


@pytest.mark.parametrize(("major", "processors", "expected"), [(9, 132, True), (9, 16, True), (9, 15, False), (8, 108, False), (10, 148, False)])
def test_those_that_wait_run_at_once(major: int, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, multi_processor_count=processors))
    monkeypatch.setattr(machine, "multiprocessors", machine.multiprocessors.__wrapped__)
    facts = linears(1, 1, (8,) * 28).group.facts._replace(device=torch.device("cuda:0"))
    row = Row("wide", gate_pieces=8, tile=Tile(64, 128, 64, 4, 4))
    assert (wide_path.can_launch_before(Case(facts, 512, 2, aligned=True), row) is None) is expected
    assert "aligned" in (wide_path.can_launch_before(Case(facts, 512, 2), row) or "")
    assert "not few" in (wide_path.can_launch_before(Case(facts._replace(max_rank=0), 512, 2, aligned=True), row) or "")
    assert "flags" in (wide_path.can_launch_before(Case(facts, 64 * 512 + 1, 2, aligned=True), row) or "")


def test_chosen_rows_are_few() -> None:
    assert [ranks_of(8, 2, 256), ranks_of(5, 3, 256), ranks_of(64, 2, 256), ranks_of(65, 2, 256), ranks_of(0, 2, 256)] == [8, 8, 64, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [257, 512, 1000, 4096, 8191])
def test_the_copy_is_exact(tokens: int) -> None:
    """The table's tiles for o at full size give the same result many times, next to other work; the buffer is filled with NaN first."""
    given = linears(1, tokens, (8,) * 28, 4096, torch.bfloat16)
    rows = [row for row in shipped("h100").group if row.path == "wide" and row.gate_pieces and row.tokens.holds(tokens)]
    assert rows
    for row in rows:
        wanted = exact(given)
        for seed in range(10):
            buffer = write(given, row)
            if seed == 0:
                first = buffer
                errors = (h_of(given, buffer).double() - wanted).norm(dim=2) / wanted.norm(dim=2)
                assert float(errors.median()) < 2e-3
                assert int((errors > 1e-2).sum()) <= 2  # ties that float32 cannot resolve
            assert torch.equal(buffer, first)
