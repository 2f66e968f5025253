"""Colours: readable as backgrounds of text, and distinguishable for colour-blind readers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from meteora_core.trace.palette import BLACK, DARK_PAPER, HUES, WHITE, contrast, look, luminance, mix, parse, tint, to_hex

# Matrices of Machado, Oliveira and Fernandes (2009) for severity 1.0, applied to linear RGB.
SIMULATIONS = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def cielab(linear: np.ndarray) -> np.ndarray:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in matrix @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def linear(colour: str) -> np.ndarray:
    values = np.array(parse(colour)) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("sight", SIMULATIONS)
def test_hues_and_their_tints_stay_apart(sight) -> None:
    for kind in ("hue", "light"):
        seen = [cielab(SIMULATIONS[sight] @ linear(getattr(look(index), kind))) for index in range(len(HUES))]
        assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 13


def test_text_is_readable_on_every_tint() -> None:
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    for index in range(30):
        for weight in np.linspace(0, 1, 11):
            assert contrast(parse(tint(index, float(weight))), BLACK) >= 4.5
            assert contrast(mix(parse(look(index).dark), DARK_PAPER, float(weight)), WHITE) >= 4.5


def test_a_larger_weight_is_darker() -> None:
    for index in range(len(HUES)):
        shades = [luminance(parse(tint(index, weight / 10))) for weight in range(11)]
        assert shades == sorted(shades, reverse=True)
        assert shades[0] - shades[-1] > 0.1
    assert tint(0, 7.0) == tint(0, 1.0)


def test_28_adapters_look_different() -> None:
    assert len({(look(index).hue, look(index).pattern) for index in range(28)}) == 28
    assert look(28) == look(0)


def test_hexadecimal_both_ways() -> None:
    assert to_hex(parse("#01fE9a")) == "#01fe9a"
