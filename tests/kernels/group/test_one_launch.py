"""The one-launch path for a few dozen tokens, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from meteora_kernels import Routing
from meteora_kernels.group import one_launch, row_for, run_group
from meteora_kernels.plan import Case, Row, Span, machine, readable
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, check_rounded_once, errors, members, nan_stays, ties
from support.kernel_rows import taking

TILE = Tile(64, 32, 16, 4, 3)
"""A row with steps so short that 72 columns are several pieces."""

needs_copy_engine = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")


def row(pieces: int = 1, gate_pieces: int = 2, tile: Tile = TILE) -> Row:
    return Row("one_launch", Span(1, tile.tokens), pieces=pieces, gate_pieces=gate_pieces, tile=tile)


@needs_copy_engine
@pytest.mark.parametrize("masked", [False, True], ids=["", "bias-and-mask"])
@pytest.mark.parametrize(("pieces", "gate_pieces"), [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(("widths", "tokens"), [((40,), 1), ((24, 41), 33), ((24, 9, 33), 64), ((24, 9, 33), 17)])
def test_equals_its_members(widths: tuple[int, ...], tokens: int, pieces: int, gate_pieces: int, masked: bool) -> None:
    """Tiles extend past every member, sums have pieces of unequal length, and rows have gaps."""
    given = members(widths, tokens, bias=masked, dtype=torch.float16, gap=24 if masked else 0)
    allowed = torch.tensor([True, False, True, False, True], device=DEVICE) if masked else None
    tile = TILE._replace(outputs=64) if pieces > 2 else TILE
    check_rounded_once(given, row(pieces, gate_pieces, tile), Routing(2, 3.0 if masked else 1.0, allowed))


@needs_copy_engine
@pytest.mark.parametrize(
    ("ranks", "top_k", "hidden"),
    [((1,), 1, 8), ((2, 70, 0), 3, 24), ((300, 20), 1, 24), ((4,) * 9, 8, 136), pytest.param((1,) * 300, 2, 64, marks=pytest.mark.slow)],
    ids=["one-adapter", "a-rank-above-h", "more-rows-than-a-chunk", "top-8", "many"],
)
def test_takes_any_ranks(ranks: tuple[int, ...], top_k: int, hidden: int) -> None:
    check_rounded_once(members((40, 24), 19, ranks=ranks, hidden=hidden, dtype=torch.float16), row(2, 2), Routing(top_k))


@needs_copy_engine
@pytest.mark.parametrize(("tokens", "pieces"), [(8, 1), (11, 2), (16, 1), (17, 1), (32, 2), (100, 1), (128, 3)])
def test_takes_other_blocks_of_tokens(tokens: int, pieces: int) -> None:
    tile = Tile(16 if tokens <= 16 else 32 if tokens <= 32 else 128, 64, 16, 4, 2)
    check_rounded_once(members((40, 24), tokens, dtype=torch.float16), row(pieces, 2, tile))


@needs_copy_engine
def test_takes_bfloat16() -> None:
    if DEVICE == "cpu":
        pytest.skip("the interpreter computes in NumPy, which has no bfloat16")
    check_rounded_once(members((200, 72), 64, dtype=torch.bfloat16, hidden=520), row(2, 2, Tile(64, 64, 64, 4, 4)))


@needs_copy_engine
@pytest.mark.parametrize("pieces", [1, 2])
def test_nan_stays_in_its_token(pieces: int) -> None:
    nan_stays(members((24, 9), 20, dtype=torch.float16), row(pieces), in_adapter=False)


@needs_copy_engine
def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    check_rounded_once(ties(members((24,), 18, ranks=(2, 2, 2, 2), dtype=torch.float16)), row(), Routing(1))


@needs_copy_engine
def test_groups_take_it_where_the_table_says_so_and_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next row is used for rows that are not aligned to 16 bytes, for float32, and for more tokens than the tile holds."""
    called: list[int] = []
    run = one_launch.run
    monkeypatch.setattr(one_launch, "run", lambda x, *others, **options: [called.append(len(x)), run(x, *others, **options)][1])
    with taking(Row("one_launch", Span(8, 64), pieces=2, gate_pieces=3, tile=TILE), Row("packed")):
        for tokens, hidden, dtype, most in (
            (8, 72, torch.float16, 5e-4),
            (20, 72, torch.float16, 5e-4),
            (65, 72, torch.float16, 5e-3),
            (20, 20, torch.float16, 5e-3),
            (20, 72, torch.float32, 1e-5),
        ):
            given = members((24, 9), tokens, hidden=hidden, dtype=dtype)
            assert float(errors(run_group(given.x, given.group, Routing()), given.exact()).max()) < most
    assert called == [8, 20]


def test_rows_that_the_copy_engine_cannot_read() -> None:
    x = torch.zeros(20, 72, dtype=torch.float16)
    assert readable(x)
    assert not readable(x.float())
    assert not readable(x[:, 1:])
    assert not readable(x.t().contiguous().t())
    assert not readable(x[:, :68].contiguous())


@pytest.mark.parametrize(("major", "processors", "expected"), [(9, 132, True), (9, 16, False), (9, 4, False), (8, 108, False), (10, 148, False)])
def test_gates_must_all_run_at_once(major: int, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs wait for each other, so a part of a GPU with too few multiprocessors must not start them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, multi_processor_count=processors))
    monkeypatch.setattr(machine, "multiprocessors", machine.multiprocessors.__wrapped__)
    facts = members((8, 8), 1, ranks=(8,) * 28, dtype=torch.float16).group.facts._replace(device=torch.device("cuda:0"))
    one = row(1, 8, Tile(64, 128, 64, 4, 4))
    assert (one_launch.can_run(Case(facts, 64, 2, aligned=True), one) is None) is expected
    assert "aligned to 16 bytes" in (one_launch.can_run(Case(facts, 64, 2), one) or "")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@needs_copy_engine
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
    """The table's row at sizes that fill the GPU gives the same output for any order of programs."""
    given = members(widths, tokens, ranks=(8,) * 28, hidden=hidden, dtype=torch.bfloat16, bias=hidden < 4096)
    assert row_for(given.group, tokens, 2, aligned=True).path == "one_launch"

    def run() -> Tensor:
        return run_group(given.x, given.group, Routing())

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(5):
        given.x.copy_(torch.randn(given.x.shape, generator=torch.Generator().manual_seed(seed)))
        exact = given.exact()
        graph.replay()
        own = float(errors(exact.bfloat16(), exact).median())
        assert float(errors(found, exact).median()) <= 1.2 * own
        first = found.clone()
        for _ in range(10):
            graph.replay()
            assert torch.equal(found, first)
    assert int(given.group.flags.abs().sum()) == 0
