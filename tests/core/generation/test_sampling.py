"""Draws of tokens from a row's scores."""

from __future__ import annotations

import pytest
import torch

from meteora_core.generation.sampling import Sampling, drawing

SCORES = torch.linspace(-3.0, 3.0, 50)


def drawn(sampling: Sampling) -> list[int]:
    draw = drawing(sampling, torch.device("cpu"))
    return [draw(SCORES) for _ in range(40)]


@pytest.mark.parametrize("top_p", [1, 0.5])
def test_a_whole_number_is_a_temperature_too(top_p: float) -> None:
    whole, fraction = (drawn(Sampling(temperature=temperature, top_p=top_p, seed=3)) for temperature in (1, 1.0))
    assert whole == fraction
    assert len(set(whole)) > 3


def test_the_seed_decides() -> None:
    assert drawn(Sampling(temperature=1.0, seed=1)) == drawn(Sampling(temperature=1.0, seed=1)) != drawn(Sampling(temperature=1.0, seed=2))


def test_top_p_leaves_out_unlikely_tokens() -> None:
    mass = torch.softmax(SCORES, -1).sort(descending=True)
    likely = set(mass.indices[: int((mass.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert set(drawn(Sampling(temperature=1.0, top_p=0.3))) <= likely


def test_a_temperature_next_to_zero_is_greedy() -> None:
    assert drawn(Sampling(temperature=1e-310)) == drawn(Sampling(temperature=1e-40, top_p=0.5)) == drawn(Sampling(temperature=1e-9, seed=7))
    assert len(set(drawn(Sampling(temperature=1e-310)))) == 1
