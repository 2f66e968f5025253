"""Tuning: what is tried, what is refused, when a challenger wins, and the table that is written; everything but the timing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from meteora_core.bench import ModelShape, tuning, warming
from meteora_core.bench.contenders import Setting, make_layer
from meteora_core.bench.timing import Work, pairs
from meteora_core.bench.tuning import candidates, configuration, decide, described, group_problem, layer_problem, row_to_write, tune
from meteora_core.errors import UsageError
from meteora_kernels import plan
from meteora_kernels.group import CAN_RUN
from meteora_kernels.plan import Case, Facts, Row, Span
from meteora_kernels.plan.table import parse, shipped
from meteora_kernels.tile import Tile

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
TINY = ModelShape("tiny", 32, 16, 48, 4, 2, 2, 64)
SETTING = Setting(3, 4, 2)
ROWS = [Row("packed"), Row("split"), Row("split", pieces=2)]


class Times:
    """A clock that says what it is told, by the order of the works; in pairs the challenger takes these parts of the incumbent's time."""

    def __init__(self, medians: list[float], parts: list[float]) -> None:
        self.times, self.parts = medians, parts

    def ready(self, work: Work) -> Work:
        return work

    def medians(self, works: dict[str, Work]) -> dict[str, float]:
        return {name: self.times[index] if index < len(self.times) else 9.0 for index, name in enumerate(works)}

    def pairs(self, one: Work, other: Work) -> list[tuple[float, float]]:
        return [(2.0, 2.0 * part) for part in self.parts]


def works() -> dict[Row, Work]:
    return {row: lambda: None for row in ROWS}


@pytest.mark.parametrize(
    ("medians", "parts", "winner", "ratio"),
    [
        pytest.param([1.0, 0.5, 2.0], [0.5] * 8, 1, 0.5, id="faster"),
        pytest.param([1.0, 0.99, 2.0], [0.5] * 8, 0, 1.0, id="within-the-noise"),
        pytest.param([1.0, 0.5, 2.0], [0.99] * 8, 0, 1.0, id="pairs-disagree"),
        pytest.param([1.0, 0.5, 2.0], [0.5] * 5 + [1.5] * 3, 0, 1.0, id="faster-in-too-few-pairs"),
        pytest.param([1.0, 0.5, 2.0], [0.5] * 6 + [1.5] * 2, 1, 0.5, id="faster-in-enough-pairs"),
        pytest.param([0.4, 0.5, 2.0], [], 0, 1.0, id="already-the-fastest"),
    ],
)
def test_the_incumbent_stays_unless_a_challenger_wins_again_in_pairs(medians: list[float], parts: list[float], winner: int, ratio: float) -> None:
    found, part, times = decide(works(), ROWS[0], Times(medians, parts))
    assert (found, part) == (ROWS[winner], ratio)
    assert times == dict(zip(ROWS, medians, strict=True))


def test_pairs_take_turns() -> None:
    order: list[str] = []
    found = pairs(lambda: order.append("a"), lambda: order.append("b"), torch.device("cpu"), 4, lambda: order.append("-"))
    assert "".join(order) == "-a-b-b-a-a-b-b-a"
    assert len(found) == 4
    assert all(first > 0 and second > 0 for first, second in found)


def test_candidates_are_all_configurations_once_with_the_reason_why_not() -> None:
    case = Case(Facts(4096, (4096,), 28, 224, 8, torch.bfloat16, torch.device("cpu")), 64, 2)
    found = dict(candidates(shipped("h100").group, case, CAN_RUN))
    assert found[Row("split")] == found[Row("packed", inline=True)] == ""
    assert any(row.path == "one_launch" and "aligned" in reason for row, reason in found.items())
    assert any(row.path == "decode_all_rows" and "64 tokens" in reason for row, reason in found.items())
    assert all(reason for row, reason in found.items() if row.path == "wide")
    assert not any(row.in_place for row in found)  # a condition, which does not hold
    assert all(row.hidden == row.outputs == Span() and not row.measured for row in found)


def test_configurations_have_no_sizes() -> None:
    tile = Tile(64, 64, 128, 4, 3)
    row = Row("packed", Span(17, 64), outputs=Span(9), half=True, pieces=2, tile=tile, inline=True, measured="there")
    assert configuration(row) == Row("packed", half=True, pieces=2, tile=tile, inline=True)
    assert described(row) == "packed pieces 2 tile 64x64x128x4x3 inline"
    launch = Row("one_launch", Span(17, 32), pieces=1, gate_pieces=2, tile=tile)
    assert configuration(launch).tokens == Span(0, 64)


def test_problems_are_right_and_wrong_work_is_found() -> None:
    linears = make_layer(TINY, SETTING, torch.float16, DEVICE, fused=True)
    problem = group_problem(linears[0], 17, SETTING)
    assert problem.error(Row("packed", inline=True)) < 2
    assert layer_problem(linears[0], 3, SETTING).error(Row("many_tokens", inline=True)) < 3
    calls: list[int] = []
    object.__setattr__(problem, "work", lambda row: problem.exact.half() * (2 if row.path == "split" else 1) + len(calls) * (calls.append(1) is None))
    assert problem.error(Row("packed")) == math.inf  # two runs differ
    object.__setattr__(problem, "work", lambda row: problem.exact.half() * 2)
    assert problem.error(Row("packed")) > 100


def test_entries_hold_for_the_sizes_that_were_measured() -> None:
    facts = Facts(32, (32, 16), 3, 12, 4, torch.float16, DEVICE)
    choice = tuning.Choice("group", (32, 16), 32, 64, ROWS[0], ROWS[2], 0.5, ())
    row = row_to_write(choice, 16, facts, 2, "here")
    assert (row.tokens, row.hidden, row.outputs, row.top_k) == (Span(32, 64), Span(32, 32), Span(48, 48), Span(2, 2))
    assert row.fits(Case(facts, 64, 2))
    assert not row.fits(Case(facts, 31, 2))
    assert not row.fits(Case(facts._replace(widths=(48, 48)), 64, 2))
    assert row_to_write(choice, 0, facts, 2, "here").tokens == Span(64, 64)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The user's table, and the choices as they were afterwards."""
    file = tmp_path / "kernels" / "mine.toml"
    monkeypatch.setenv("METEORA_KERNEL_TABLE", str(file))
    before = plan.use(DEVICE, None)
    yield file
    plan.use(DEVICE, before)


def test_tuning_writes_a_table_that_is_read_back(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first challenger of every size wins; entries for other sizes stay, and a second run that changes nothing writes nothing."""
    monkeypatch.setattr(warming, "make_layer", lambda *arguments, **options: make_layer(*arguments, **options)[1:2])
    monkeypatch.setattr(tuning, "shipped_tables", list)
    monkeypatch.setattr(tuning, "MORE_ROWS", {})
    few = parse('[[group]]\npath = "packed"\ninline = true\n[[group]]\npath = "split"\n[[layer]]\npath = "many_tokens"\n', "few")
    plan.use(DEVICE, few)
    table.parent.mkdir()
    old = '[[group]]\npath = "split"\ntokens = 99\nmeasured = "before"\n'
    table.write_text(old, encoding="utf-8")
    found = tune(TINY, SETTING, (3, 17), dtype=torch.float16, device=DEVICE, clock=Times([2.0, 1.0], [0.5] * 8))
    assert [(choice.kind, choice.tokens, choice.winner.path, choice.ratio) for choice in found.choices] == [
        ("group", 3, "split", 0.5),
        ("group", 17, "split", 0.5),
        ("layer", 3, "many_tokens", 1.0),
        ("layer", 17, "many_tokens", 1.0),
    ]
    assert found.file == table
    written = parse(table.read_text(encoding="utf-8"), "mine")
    assert [(row.path, row.tokens, row.outputs) for row in written.group] == [
        ("split", Span(3, 3), Span(32, 32)),
        ("split", Span(7, 17), Span(32, 32)),
        ("split", Span(99), Span()),
    ]
    assert written.layer == ()
    assert "0.500 of packed" in written.group[0].measured
    plain = found.to_json()
    assert plain["file"] == str(table)
    assert plain["choices"][0]["incumbent"] == "packed inline"
    assert [trial["milliseconds"] for trial in plain["choices"][0]["trials"]] == [2.0, 1.0]
    text = table.read_text(encoding="utf-8")
    plan.use(DEVICE, few)
    again = tune(TINY, SETTING, (3,), dtype=torch.float16, device=DEVICE, clock=Times([1.0, 1.0], []))
    assert again.file is None
    assert table.read_text(encoding="utf-8") == text


def test_tuning_refuses_what_it_cannot_do(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tokens"):
        tune(TINY, SETTING, (0,), device=DEVICE)
    monkeypatch.setenv("METEORA_KERNEL_TABLE", "")
    with pytest.raises(UsageError, match="no table can be written"):
        tune(TINY, SETTING, (3,), device=DEVICE)
    assert not table.exists()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA GPU")
def test_tuning_on_a_gpu(table: Path) -> None:
    """Every path that can run is timed; what is written fits and can run; a second run finds the same winners or keeps them."""
    shape = ModelShape("small", 1024, 256, 2048, 8, 2, 2, 64)
    found = tune(shape, Setting(28, 8, 2), (1, 64, 600), device=DEVICE)
    assert {(choice.kind, choice.tokens) for choice in found.choices} == {(kind, count) for kind in ("group", "layer") for count in (1, 64, 600)}
    for choice in found.choices:
        assert any(trial.milliseconds for trial in choice.trials)
        assert choice.winner is choice.incumbent or choice.ratio < 1
    assert (found.file is None) == (not table.exists())
    if found.file is not None:
        written = parse(table.read_text(encoding="utf-8"), "mine")
        assert plan.table_of(DEVICE).group[: len(written.group)] == written.group
