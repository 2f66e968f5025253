"""Numbers that a caller gives."""

from __future__ import annotations

import math

import pytest

from meteora_core.errors import UsageError
from meteora_core.ranges import LEAST_TEMPERATURE, MOST_TEMPERATURE, check_range, check_temperature
from meteora_kernels.types import TEMPERATURES


def test_temperatures_have_the_range_of_the_kernels() -> None:
    assert (LEAST_TEMPERATURE, MOST_TEMPERATURE) == TEMPERATURES
    assert [check_temperature(value) for value in (*TEMPERATURES, 1.18e-38, 8.5e37)] == [*TEMPERATURES, 1.18e-38, 8.5e37]


def test_numbers_in_the_range_are_returned() -> None:
    assert check_range("n", 3, 1, 3) == 3
    assert check_range("x", 0.5, 0, 1, above=True) == 0.5


@pytest.mark.parametrize("value", [0, 4, -1, 10**30, -(10**30), math.nan, math.inf, -math.inf])
def test_others_are_refused_in_one_short_line(value: float) -> None:
    with pytest.raises(UsageError, match=r"^n must be at least 1 and at most 3, not ") as caught:
        check_range("n", value, 1, 3)
    assert len(caught.value.message) < 100


def test_an_open_border() -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1,000, not 0"):
        check_range("x", 0, 0, 1000, above=True)
