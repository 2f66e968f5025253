"""The chosen adapters of many for a few dozen tokens, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.group import chosen_adapters, row_for, run_group
from meteora_kernels.plan import Case, Row, Span
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, check_rounded_once, members, nan_stays, ties
from support.kernel_rows import taking

TILE = Tile(64, 32, 16, 4, 3)
"""Steps so short that 72 columns are several pieces."""

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")


def row(pieces: int = 1, gate_pieces: int = 2, tile: Tile = TILE) -> Row:
    return Row("chosen_adapters", Span(1, tile.tokens), pieces=pieces, gate_pieces=gate_pieces, tile=tile)


@pytest.mark.parametrize(
    ("ranks", "widths", "hidden", "tokens", "top_k", "pieces"),
    [
        pytest.param((3, 0, 8, 1, 5), (24, 9, 33), 72, 17, 2, (1, 3), id="mixed"),
        pytest.param((2,) * 40, (24, 70), 64, 5, 3, (2, 2), id="40x2-top3"),
        pytest.param((0, 0, 0), (40,), 24, 3, 1, (1, 1), id="no-rows"),
        pytest.param((70, 2, 40), (40,), 24, 19, 1, (1, 2), id="ranks-above-a-tile"),
        pytest.param((4,) * 9, (33, 24), 136, 33, 8, (3, 2), id="top-8", marks=pytest.mark.slow),
        pytest.param((1,) * 300, (24,), 64, 64, 2, (1, 2), id="300x1", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, tokens: int, top_k: int, pieces: tuple[int, int]) -> None:
    """Tiles extend past every member, there are a bias, a mask and gaps between the rows, and sums have pieces of unequal length."""
    masked = tokens == 17
    given = members(widths, tokens, ranks=ranks, hidden=hidden, bias=masked, dtype=torch.float16, gap=24 if masked else 0)
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if masked else None
    check_rounded_once(given, row(*pieces), Routing(top_k, 1.5, allowed))


@pytest.mark.parametrize("tokens", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_takes_other_blocks_of_tokens(tokens: int) -> None:
    tile = Tile(16 if tokens == 16 else 128, 64, 16, 4, 2)
    check_rounded_once(members((40, 24), tokens, dtype=torch.float16), row(2, 1, tile))


def test_few_programs_of_the_base_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with fewer multiprocessors than tiles, those of the base that do not start with the gates come last."""
    monkeypatch.setattr(chosen_adapters, "at_once", lambda device: 5)
    check_rounded_once(members((100, 60), 6, dtype=torch.float16), row(1, 2))


def test_nan_stays_in_its_token_and_in_its_adapter() -> None:
    nan_stays(members((24, 9), 5, dtype=torch.float16), row())


def test_ties_go_to_the_lower_index_and_logits_are_not_rounded() -> None:
    check_rounded_once(ties(members((24,), 6, ranks=(2, 2, 2, 2), dtype=torch.float16)), row(), Routing(1))


def test_says_what_it_cannot_do() -> None:
    facts = members((8, 8), 1, ranks=(8,) * 28, dtype=torch.float16).group.facts
    case = Case(facts, 64, 2, aligned=True)
    assert "aligned to 16 bytes" in (chosen_adapters.can_run(case._replace(aligned=False), row()) or "")
    assert "the tile holds 64" in (chosen_adapters.can_run(case._replace(tokens=65), row()) or "")
    assert "up to 16 of 4,096" in (chosen_adapters.can_run(case._replace(facts=facts._replace(adapters=5000)), row()) or "")
    wide = case._replace(top_k=8, facts=facts._replace(adapters=1024, max_rank=64))
    assert "flags" in (chosen_adapters.can_run(wide, row()) or "")


def test_a_tile_must_hold_all_tokens() -> None:
    for changes in ({"tokens": Span(1, 65)}, {"pieces": 0}, {"gate_pieces": 0}, {"tile": None}, {"tile": TILE._replace(step=8)}):
        with pytest.raises(ValueError, match="needs"):
            replace(row(), **changes)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("widths", "hidden"), [((4096, 1024, 1024), 4096), ((4096,), 14336), ((8192, 8192), 1024), ((1500, 777, 31), 1000)])
def test_a_graph_replays_with_new_inputs(widths: tuple[int, ...], hidden: int) -> None:
    """At sizes that fill the GPU, the output is the same for any order of programs."""
    given = members(widths, 50, ranks=(8,) * 256, hidden=hidden, dtype=torch.bfloat16)
    with taking(row(1, 4, Tile(64, 64, 128, 4, 4)), Row("packed")):
        assert row_for(given.group, 50, 2, aligned=True).path == "chosen_adapters"
        run_group(given.x, given.group, Routing())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run_group(given.x, given.group, Routing())
    for seed in range(3):
        given.x.copy_(torch.randn(given.x.shape, generator=torch.Generator().manual_seed(seed)))
        exact = given.exact()
        graph.replay()
        first = found.clone()
        own = (exact.bfloat16().double() - exact).norm(dim=1) / exact.norm(dim=1)
        off = (first.double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(off.median()) <= 1.2 * float(own.median())
        graph.replay()
        assert torch.equal(found, first)
    assert int(given.group.flags.abs().sum()) == 0
