"""The cases of a large grid that run in Triton's interpreter."""

from __future__ import annotations

from itertools import combinations, product

from support.covering import covering

GRID = [dict(zip("abcd", case, strict=True)) for case in product("123", "12345", "xy", "xy")]


def test_every_two_values_of_two_parameters_meet() -> None:
    chosen = [GRID[place] for place in covering(GRID, 2)]
    for one, other in combinations("abcd", 2):
        assert {(case[one], case[other]) for case in chosen} == {(case[one], case[other]) for case in GRID}
    assert 15 <= len(chosen) <= 18


def test_every_value_occurs_and_values_are_spread() -> None:
    chosen = [GRID[place] for place in covering(GRID, 1)]
    for name in "abcd":
        assert {case[name] for case in chosen} == {case[name] for case in GRID}
    assert len(chosen) == 5


def test_missing_combinations_are_not_asked_for() -> None:
    cases = [{"a": "1", "b": "1"}, {"a": "2", "b": "2"}]
    assert covering(cases, 2) == [0, 1]
