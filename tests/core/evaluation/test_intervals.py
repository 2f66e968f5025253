"""95 % intervals of single scores."""

from __future__ import annotations

import random

import pytest

from meteora_core.evaluation.intervals import score_interval, wilson_interval


def test_wilsons_limits_solve_the_score_test() -> None:
    for share, rows in ((0.0, 40), (0.3, 40), (1.0, 12), (0.55, 200)):
        for limit in wilson_interval(share, rows):
            if 0 < limit < 1:
                assert abs(share - limit) == pytest.approx(1.959964 * (limit * (1 - limit) / rows) ** 0.5)
    assert wilson_interval(0.0, 40)[0] == 0
    assert wilson_interval(1.0, 40)[1] == 1


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.9])
def test_they_cover_the_truth(truth: float) -> None:
    rng, covered = random.Random(1), 0
    for _ in range(2000):
        low, high = wilson_interval(sum(rng.random() < truth for _ in range(40)) / 40, 40)
        covered += low <= truth <= high
    assert 0.93 < covered / 2000 < 0.985


def test_other_metrics_take_their_standard_error() -> None:
    assert score_interval("accuracy", 0.5, None, 10) == wilson_interval(0.5, 10)
    assert score_interval("correct", 1.5, 0.5, 4) == (pytest.approx(0.520018), pytest.approx(2.479982))
    assert score_interval("correct", 1.0, None, 1) is None
    assert score_interval("accuracy", 0.0, None, 0) is None
