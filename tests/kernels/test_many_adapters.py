"""Chosen rows of many adapters against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Adapters, Routing, lora_mixture, many_adapters
from meteora_kernels.group import row_for, run_group
from meteora_kernels.layer import many_adapters_operator
from meteora_kernels.many_adapters import can_run, launch, reference, run_layer
from meteora_kernels.plan import Case, Row
from support.kernel_groups import DEVICE, RANKS, check_bits, check_rounded_once, check_ties, members, nan_stays
from support.kernel_rows import taking
from support.layer_shapes import routed
from support.mixture_cases import make

NAMES = ("few", "sorted_down", "sorted")
WAYS = [Row("many_adapters", way=way) for way in NAMES]


@pytest.mark.parametrize(
    ("way", "ranks", "widths", "hidden", "tokens", "top_k"),
    [
        pytest.param("few", RANKS, (17, 9, 5), 24, 3, 2, id="few-mixed"),
        pytest.param("few", (20, 3), (9,), 18, 2, 2, id="few-rank-20"),
        pytest.param("few", (0, 0), (5,), 16, 1, 1, id="few-no-rows"),
        pytest.param("sorted", RANKS, (17, 9, 5), 24, 3, 2, id="sorted-mixed"),
        pytest.param("sorted", (20, 3), (9,), 18, 5, 2, id="sorted-rank-20"),
        pytest.param("sorted", (0, 0), (5,), 16, 1, 1, id="sorted-no-rows"),
        pytest.param("sorted", (2,) * 6, (5,), 20, 19, 3, id="sorted-top3"),
        pytest.param("sorted_down", RANKS, (17, 9, 5), 24, 3, 2, id="sorted-down-mixed"),
        pytest.param("sorted_down", (20, 3), (9,), 18, 5, 2, id="sorted-down-rank-20"),
        pytest.param("sorted_down", (0, 0), (5,), 16, 1, 1, id="sorted-down-no-rows"),
        pytest.param("sorted_down", (2,) * 6, (5,), 20, 19, 3, id="sorted-down-top3"),
        pytest.param("few", (2,) * 20, (24, 140), 140, 37, 3, id="few-many", marks=pytest.mark.slow),
        pytest.param("sorted", (2,) * 12, (24, 140), 140, 70, 3, id="sorted-many", marks=pytest.mark.slow),
        pytest.param("sorted_down", (2,) * 12, (24, 140), 140, 70, 3, id="sorted-down-many", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(way: str, ranks: tuple[int, ...], widths: tuple[int, ...], hidden: int, tokens: int, top_k: int) -> None:
    """Sizes do not fill a tile, there are a bias and a mask, and two runs are bit-equal."""
    given, row = members(widths, tokens, ranks=ranks, hidden=hidden, bias=tokens == 3), Row("many_adapters", way=way)
    allowed = torch.arange(len(ranks), device=DEVICE) % 3 != 1 if tokens == 3 else None
    routing = Routing(top_k, 1.5, allowed)
    found = given.run(row, routing)
    torch.testing.assert_close(found, given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    check_bits(found, lambda: given.run(row, routing))


@pytest.mark.parametrize("way", ["sorted_down", "sorted"])
def test_sums_over_columns_may_come_in_pieces(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a block adds the pieces; h fills neither a step nor a piece."""
    for tile in ("DOWN_TILE", "DOWN_TOGETHER"):
        monkeypatch.setattr(launch, tile, (32, 1, 2, 1 << 20))
    given, routing = members((5,), 2, hidden=262), Routing()
    taken: list[int] = []
    plain = launch.pieces_of
    monkeypatch.setattr(launch, "pieces_of", lambda *sizes: taken.append(plain(*sizes)) or taken[-1])
    torch.testing.assert_close(given.run(Row("many_adapters", way=way), routing), given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    assert taken[-1] == 2


@pytest.mark.parametrize("way", NAMES)
def test_the_base_product_may_come_in_pieces(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, routing = members((17, 9), 3, hidden=32, bias=True), Routing()
    taken: list[int] = []
    plain = many_adapters.library_products
    monkeypatch.setattr(many_adapters, "library_products", lambda *arguments: [plain(*arguments), taken.append(arguments[2])][0])
    torch.testing.assert_close(given.run(Row("many_adapters", way=way, pieces=4), routing), given.exact(routing).float(), rtol=2e-4, atol=2e-4)
    assert taken == [4]


@pytest.mark.parametrize("widths", [(9,), (17, 9, 5)])
def test_gates_by_the_library_are_those_of_the_kernel(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = members(widths, 5, hidden=24, dtype=torch.float16)
    plain = launch.gate_logits(given.x, given.group.adapters)
    routes = launch.route_tokens(plain, given.group.adapters, Routing())
    monkeypatch.setattr(launch, "LIBRARY_GATES", 5)
    monkeypatch.delattr(launch, "gate_sums")
    logits = launch.gate_logits(given.x, given.group.adapters)
    torch.testing.assert_close(logits.sum(0), plain.sum(0), rtol=1e-5, atol=1e-5)
    for one, other in zip(launch.route_tokens(logits, given.group.adapters, Routing()), routes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", WAYS, ids=NAMES)
def test_rounds_once_in_16_bits(row: Row) -> None:
    check_rounded_once(members((24,), 3, hidden=24, dtype=torch.float16), row, most=1.15)


@pytest.mark.parametrize("row", WAYS, ids=NAMES)
def test_nan_stays_in_its_token_and_in_its_adapter(row: Row) -> None:
    nan_stays(members((9,), 3, hidden=20), row)


@pytest.mark.parametrize("row", WAYS, ids=NAMES)
def test_ties_go_to_the_lower_index_and_logits_are_not_rounded(row: Row) -> None:
    check_ties(members((9,), 2, hidden=20, dtype=torch.float16), row)


def test_tokens_are_sorted_into_blocks_of_one_adapter() -> None:
    """Every token is once in each slot, in order and in blocks that do not overlap, also if one adapter has many tokens and another none."""
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
    given, routing = members((9,), 4, hidden=24), Routing()
    case, adapters = given.cases[0], given.group.adapters
    found = launch.sort_tokens(launch.gate_logits(case.x, adapters), adapters, routing)
    middle = launch.blocks_down(case.x, found, adapters)
    order = (case.x @ case.gate.t()).topk(2, dim=1).indices
    for slot in range(2):
        wanted = reference.middle_of(case.x, case.lora_A, order[:, slot], found.factors[slot], case.offsets, adapters.rank_p)
        torch.testing.assert_close(middle[slot], wanted, rtol=2e-4, atol=2e-4)


def test_says_what_it_cannot_do() -> None:
    facts, row = members((9,), 2, hidden=16).group.facts, WAYS[0]
    assert can_run(Case(facts, 17, 2), row) is None
    assert "largest rank is 300" in (can_run(Case(facts._replace(max_rank=300), 17, 1), row) or "")
    assert "up to 16" in (can_run(Case(facts, 17, 17), row) or "")
    assert "4,096" in (can_run(Case(facts._replace(adapters=5000), 17, 2), row) or "")
    assert "not float64" in (can_run(Case(facts._replace(dtype=torch.float64), 17, 1), row) or "")
    assert "inference" in (can_run(Case(facts, 17, 1, plain=False), row) or "")


@pytest.mark.parametrize("way", NAMES)
def test_the_table_s_way_is_taken_by_groups_and_by_layers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is used from 17 tokens on if the table says so, and the next row for cases that the kernels cannot run."""
    given, routing = members((5,), 17, ranks=(1,) * 4, hidden=16, bias=True), Routing(1)
    taken: list[str] = []
    plain = many_adapters.FORWARDS[way]
    monkeypatch.setitem(many_adapters.FORWARDS, way, lambda *arguments: [taken.append(way), plain(*arguments)][1])
    row = Row("many_adapters", way=way)
    with taking(row, Row("packed"), layer=(row, Row("many_tokens"))):
        torch.testing.assert_close(run_group(given.x, given.group, routing), given.exact(routing).float(), rtol=2e-4, atol=2e-4)
        assert taken == [way]
        assert row_for(members((5,), 17, ranks=(300,), hidden=16).group, 17, 1).path == "packed"
        case = given.cases[0]
        mixed = lora_mixture(*case.arguments, top_k=1, backend="triton")
    exact = lora_mixture(*case.copy(torch.float64).arguments, top_k=1, backend="reference")
    torch.testing.assert_close(mixed, exact.float(), rtol=2e-4, atol=2e-4)  # type: ignore[union-attr]


def test_operator_is_sound_for_compilers() -> None:
    case = make([4] * 6, 16, 9, (18,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    flat = many_adapters_operator.flat((x, base, Adapters.of_layer(*tensors, 4), Routing()))
    with taking(layer=(Row("many_adapters", way="few"),)):
        found = torch.library.opcheck(many_adapters_operator.op, flat, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("way", NAMES)
@pytest.mark.parametrize("one", [False, True])
def test_chosen_rows_on_top_of_a_base(way: str, one: bool) -> None:
    """Routes are random, or all tokens choose one adapter; the sum with a rounded base output is rounded once."""
    wide = make([5, 17, 3, 0, 9, 1], 20, 40, (18,), torch.float64, device=DEVICE)
    wide.lora_B *= 0.2
    if one:
        wide.x[:] = wide.x[0].clone()
    case = wide.copy(torch.float16)
    adapters = Adapters.of_layer(case.gate, case.lora_A, case.lora_B, case.scaling.float(), case.offsets, 17)
    output, _ = run_layer(case.x, case.base, adapters, Routing(2, 1.5), Row("many_adapters", way=way))
    expected = routed(case.copy(torch.float64), 2)

    def error(got: torch.Tensor) -> float:
        return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).median())

    assert error(output) <= 1.15 * error(expected.half())
