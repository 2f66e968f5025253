"""Scores relative to the oracle's: averages over tasks and seeds, intervals that hold what they promise, and their forms."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import pytest

from meteora_core.errors import DataError, UsageError
from meteora_core.evaluation.oracle_shares import oracle_shares, plot_shares, shares_document, shares_markdown


def document(model: str, errors: float | str = 0.01, **scores: float) -> dict[str, Any]:
    results = {task: {"alias": task, "acc,none": value, "acc_stderr,none": errors} for task, value in scores.items()}
    return {"results": results, "model_name": model}


ORACLE = document("router:oracle", a=0.5, b=0.8, c=0.0)


def test_seeds_are_runs_of_one_model_and_tasks_count_alike() -> None:
    documents = [
        document("router:random@1", a=0.25, b=0.4, c=0.3),
        ORACLE,
        document("router:random@2", a=0.5, b=0.4, c=0.1),
        document("meteora", a=0.55, b=0.8, c=0.2),
        document("router:random:without-asked@2", a=0.0, b=0.08, c=0.0),
    ]
    drawn, own, removed = oracle_shares(documents)
    assert (drawn.model, drawn.runs, drawn.tasks) == ("router:random", 2, {"a": pytest.approx(0.75), "b": pytest.approx(0.5)})  # c: the oracle has 0
    assert drawn.share == pytest.approx((0.5 + 0.75) / 2)
    variances = [(0.01**2 + q**2 * 0.01**2) / o**2 for q, o in ((0.5, 0.5), (0.5, 0.8), (1.0, 0.5), (0.5, 0.8))]
    half = 1.959964 * (sum(variances) / 2 / 4 + (0.125**2 * 2) / 2) ** 0.5
    assert (drawn.low, drawn.high) == (pytest.approx(drawn.share - half), pytest.approx(drawn.share + half))
    assert (own.model, own.share) == ("meteora", pytest.approx(1.05))
    assert (removed.model, removed.share) == ("router:random:without-asked", pytest.approx(0.05))
    assert [share.model for share in oracle_shares(documents, "meteora")] == ["router:random", "router:oracle", "router:random:without-asked"]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, rows, truth = random.Random(0), 200, {"a": (0.6, 0.45), "b": (0.8, 0.7), "c": (0.3, 0.2)}
    wanted, covered = fmean(router / oracle for oracle, router in truth.values()), 0
    for _ in range(400):
        drawn: list[dict[str, Any]] = [{"results": {}, "model_name": name} for name in ("router:oracle", "router:spectr")]
        for task, rates in truth.items():
            for made, rate in zip(drawn, rates, strict=True):
                value = sum(rng.random() < rate for _ in range(rows)) / rows
                made["results"][task] = {"acc,none": value, "acc_stderr,none": (value * (1 - value) / (rows - 1)) ** 0.5}
        (share,) = oracle_shares(drawn)
        assert share.low is not None
        assert share.high is not None
        covered += share.low <= wanted <= share.high
    assert 370 <= covered <= 392  # 380 are expected, with a standard deviation of 4


def test_without_standard_errors_there_is_no_interval() -> None:
    (share,) = oracle_shares([ORACLE, document("base", "N/A", a=0.1, b=0.1, c=0.0)])
    assert (share.low, share.high) == (None, None)
    assert "| base | 1 | **16.2%** | – |" in shares_markdown([share], "router:oracle").splitlines()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="there are no results of router:oracle") as caught:
        oracle_shares([document("base", a=0.1)])
    assert "--model router:oracle" in str(caught.value.hint)
    with pytest.raises(UsageError, match="only results of router:oracle"):
        oracle_shares([ORACLE])
    for other in (document("base", c=0.5), document("base", z=0.5)):
        with pytest.raises(DataError, match="no task with a positive score of router:oracle is in all results"):
            oracle_shares([ORACLE, other])


def test_json_and_a_picture(tmp_path) -> None:
    shares = oracle_shares([ORACLE, document("router:spectr", a=0.4, b=0.8, c=0.1), document("base", "N/A", a=0.1, b=0.1, c=0.0)])
    made = shares_document(shares, "router:oracle")
    assert [model["model"] for model in made["models"]] == ["router:spectr", "base"]
    assert made["models"][0]["tasks"] == {"a": pytest.approx(0.8), "b": pytest.approx(1.0)}
    assert plot_shares(shares, "router:oracle", tmp_path / "x.svg").read_text().count("router:oracle") >= 1
    with pytest.raises(UsageError, match=r"cannot draw x\.txt"):
        plot_shares(shares, "router:oracle", tmp_path / "x.txt")
