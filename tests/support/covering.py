"""A part of many cases that covers what they have in common."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any


def covering(cases: list[dict[str, str]], strength: int) -> list[int]:
    """Places of a part of the cases in which all combinations of ``strength`` values occur that occur in any of them; values are spread evenly."""

    def combined(case: dict[str, str]) -> set[Any]:
        return set(combinations(sorted(case.items()), strength))

    left, used, chosen = set().union(*map(combined, cases)), Counter[Any](), list[int]()
    while left:
        rest = [place for place in range(len(cases)) if place not in chosen]
        best = max(rest, key=lambda place: (len(combined(cases[place]) & left), -sum(used[value] for value in cases[place].items()), -place))
        chosen.append(best)
        left -= combined(cases[best])
        used.update(cases[best].items())
    return sorted(chosen)
