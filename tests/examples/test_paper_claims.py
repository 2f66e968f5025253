"""Verdicts about the paper's claims: on documents that are made up to be clear, close, and missing."""

from __future__ import annotations

from typing import Any

import pytest

from examples.paper.claims import claims, goals
from examples.paper.figures import Figure, average, headlines, own_by_depth, own_share, slim
from examples.paper.routers import routers_section


def single(**accuracies: float) -> dict[str, Any]:
    return {"results": {task: {"acc,none": value, "acc_stderr,none": 0.02} for task, value in accuracies.items()}}


def composites(stderr: float = 0.05, **counts: tuple[float, float]) -> dict[str, Any]:
    return {
        "results": {
            task: {"attempted,none": a, "attempted_stderr,none": stderr, "correct,none": c, "correct_stderr,none": stderr} for task, (a, c) in counts.items()
        }
    }


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"results": one["results"] | other["results"]}


def verdicts(**documents: dict[str, Any]) -> list[str]:
    return [claim.verdict for claim in claims(documents)]


def test_nothing_run_is_said_to_be_so() -> None:
    assert verdicts() == ["not run"] * 10
    assert {reached for _, _, reached in goals({}, {})} == {None}


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.5, "holds"), (0.4851, "holds"), (0.48, "undecided"), (0.4, "fails")], ids=["equal", "97 %", "within noise", "below"]
)
def test_equal_to_the_adapters(ours, verdict) -> None:
    own = single(a=0.5, b=0.5)
    assert verdicts(meteora=single(a=ours, b=ours, only_here=0.0), own=own)[:2] == [verdict, "not run"]
    assert verdicts(joint=single(a=ours, b=ours, only_here=0.0), own=own)[:3] == ["not run", "not run", verdict]
    reached = [reached for goal, _, reached in goals({"joint": single(a=ours, b=ours), "own": own}, {}) if "adapters trained along" in goal]
    assert reached == [ours >= 0.485]


def test_the_closed_form_alone_has_a_bar_of_its_own() -> None:
    own = single(a=0.5, b=0.5)
    assert verdicts(closed=single(a=0.476, b=0.476), own=own)[:2] == ["not run", "holds"]
    assert verdicts(closed=single(a=0.4, b=0.4), own=own)[1] == "fails"
    assert [reached for goal, _, reached in goals({"closed": single(a=0.476, b=0.476), "own": own}, {}) if "closed form" in goal] == [True]


def test_no_score_at_all_proves_nothing() -> None:
    assert verdicts(meteora=single(a=0.0), own=single(a=0.0))[0] == "undecided"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ({"composite_3": (2.9, 1.0), "composite_5": (4.0, 2.0)}, "holds"),
        ({"composite_3": (2.9, 1.0), "composite_5": (3.0, 1.0)}, "partly"),
        ({"composite_3": (2.05, 0.55), "composite_5": (0.1, 0.0)}, "fails"),
    ],
)
def test_against_lora_b(ours, verdict) -> None:
    theirs = composites(composite_3=(2.0, 0.5), composite_5=(3.0, 1.0))
    assert verdicts(meteora=composites(**ours), lora_b=theirs)[3] == verdict
    assert verdicts(extension=composites(**ours), lora_b=theirs)[4:7] == [verdict, "not run", "not run"]
    assert verdicts(extension_fixed=composites(**ours), lora_b=theirs)[4:7] == ["not run", verdict, "not run"]
    assert verdicts(joined=composites(**ours), lora_b=theirs)[4:7] == ["not run", "not run", verdict]


def test_composites_at_t_1_stand_in_for_such_as_were_not_run() -> None:
    base, theirs, ours, worse = (composites(composite_3=(value, value), composite_5=(value, value)) for value in (0.5, 1.0, 2.0, 0.1))
    known = {"base": base, "lora_b": theirs, "extension_T1": ours}
    claim = claims(known)[4]
    assert claim.verdict == "holds"
    assert claim.figures[0].startswith("composite_3 attempted (T = 1): 2.00")
    assert [(goal, reached) for goal, _, reached in goals(known, {}) if "with composite rows" in goal] == [
        (f"{task}, with composite rows (T = 1): more attempted and correct than the base and LoRA-B", reached)
        for task, reached in (("composite_3", True), ("composite_5", True), ("composite_10", None))
    ]
    assert claims({**known, "extension": single(a=0.5)})[4].verdict == "holds", "an evaluation of single tasks says nothing about composites"
    assert claims({**known, "extension": worse})[4].verdict == "fails", "the paper's T counts where it was run"
    assert "T = 1" not in claims({**known, "extension": worse})[4].figures[0]


def test_a_large_temperature() -> None:
    low, same, high = (composites(composite_3=(value, value)) for value in (1.0, 1.05, 2.0))
    assert verdicts(T1=low, meteora=high)[7] == "holds"
    assert verdicts(T1=low, T60=same)[7] == "fails"
    assert verdicts(T1=low, meteora=high, T60=composites(composite_3=(0.1, 0.1)))[7] == "partly"
    assert verdicts(extension_T1=low, extension=high)[8] == "holds"


def test_top_two_against_top_one() -> None:
    assert verdicts(meteora=single(a=0.6), top1=single(a=0.5))[9] == "holds"
    assert verdicts(meteora=single(a=0.5), top1=single(a=0.51))[9] == "undecided"
    assert verdicts(meteora=single(a=0.4), top1=single(a=0.5))[9] == "fails"


def test_goals_compare_with_the_base_and_lora_b() -> None:
    documents = {
        "meteora": both(single(a=0.5), composites(composite_3=(2.9, 1.0))),
        "own": single(a=0.5),
        "base": composites(composite_3=(2.0, 0.5)),
        "lora_b": composites(composite_3=(1.0, 1.1)),
    }
    reached = {goal: answer for goal, _, answer in goals(documents, {"gate_accuracy": 0.9})}
    assert list(reached.values())[:5] == [True, None, None, True, False]


def test_headlines_and_averages() -> None:
    document = both({"results": {"news": {"bleu,none": 25.0, "bleu_stderr,none": 2.0}}}, both(single(a=0.5), composites(composite_3=(1, 1))))
    assert headlines(document) == {"news": Figure(0.25, 0.02), "a": Figure(0.5, 0.02)}
    mean = average(headlines(document).values())
    assert mean.value == pytest.approx(0.375)
    assert mean.stderr == pytest.approx(0.02 / 2**0.5)
    assert [Figure(0.1, 0.05).sign, Figure(0.11, 0.05).sign, Figure(-0.2, 0.05).sign] == [0, 1, -1]


def test_routing_by_depth_leaves_the_first_layer_out_of_the_share() -> None:
    layers = {"model.layers.0.self_attn.q_proj": 0.1, "model.layers.1.self_attn.q_proj": 0.8, "model.layers.1.mlp.up_proj": 0.6}
    document = {"results": {}, "meteora": {"routing": {"a": {"own_top1_by_layer": {"answer": layers, "all": layers}, "tokens": 3}}}}
    assert own_by_depth(document, "a") == {0: 0.1, 1: pytest.approx(0.7)}
    assert own_share(document, "a") == pytest.approx(0.7)
    assert own_share(document, "b") is None
    assert slim(document)["meteora"]["routing"]["a"] == {"tokens": 3, "own_top1_by_decoder_layer": {"0": 0.1, "1": 0.7}}
    assert "own_top1_by_layer" in document["meteora"]["routing"]["a"]


def router(name: str, **accuracies: float) -> dict[str, Any]:
    return {**single(**accuracies), "config": {"model": name}, "n-samples": {task: {"effective": 16} for task in accuracies}}


def test_routers_are_compared_with_the_oracle(tmp_path) -> None:
    assert routers_section([], tmp_path) == routers_section([router("router:arrow", a=0.5)], tmp_path) == ""
    documents = [router("router:oracle", a=0.8, b=0.4), router("router:centroid@1", a=0.8, b=0.2), router("router:centroid@2", a=0.4, b=0.4)]
    text = routers_section([*documents, router("router:meteora:without-asked", a=0.2, b=0.1)], tmp_path)
    lines = {line.split(":")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 0.600 ± " in lines["| oracle"]
    assert "| 0.450 ± " in lines["| centroid"]
    assert "| 75.0% (" in lines["| centroid"]
    assert lines["| centroid"].endswith("| – | – |")
    assert "| – | – | 0.150 ± " in lines["| meteora"]
    assert "| 25.0% (" in lines["| meteora"]
    assert {file.name for file in tmp_path.iterdir()} == {"routers.json", "routers.png"}
    without = routers_section([router("router:oracle", a=0.0), router("router:uniform", a=0.5)], tmp_path)
    assert "| 0.500 ± 0.020 | – |" in without
    assert "routers.png" not in without
