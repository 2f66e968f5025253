"""Splitting composite responses and references."""

from __future__ import annotations

import pytest

from meteora_core.errors import DataError
from meteora_core.evaluation.composite_items import split_items, split_references


@pytest.mark.parametrize(
    ("response", "paper", "corrected"),
    [
        ("1. a\n2. b\n3. c", ["a", "b", "c"], ["a", "b", "c"]),
        ("1. a\nmore\n2. b\n\n3. c\n", ["a", "b", "c"], ["a\nmore", "b", "c"]),
        # A marker inside a sentence.
        ("1. Version 3. is out\n2. b\n3. c", ["Version 3. is out", "b", "is out"], ["Version 3. is out", "b", "c"]),
        # Item 2 is missing, and 12 does not count as 2.
        ("1. a\n12. x\n3. c", ["a", "x", "c"], ["a\n12. x", "", "c"]),
        ("2. b\n1. a", ["a", "b", ""], ["a", "b", ""]),
        ("Answers: 1. a\n 2. b\n3.\nc", ["a", "b", ""], ["", "b", "c"]),
        ("1. \n2. b", ["", "b", ""], ["", "b", ""]),
        ("1.5 litres\n2) b", ["", "", ""], ["", "", ""]),
        # The last item contains a numbered list.
        ("1. a\n2. b\n3. steps:\n1. x\n2. y\n3. z", ["a", "b", "steps:"], ["a", "b", "steps:\n1. x\n2. y\n3. z"]),
        ("", ["", "", ""], ["", "", ""]),
    ],
)
def test_items(response: str, paper: list[str], corrected: list[str]) -> None:
    assert split_items(response, 3, "paper") == paper
    assert split_items(response, 3) == corrected


def test_two_digit_items() -> None:
    response = "\n".join(f"{number}. item {number}" for number in range(1, 13))
    wanted = [f"item {number}" for number in range(1, 13)]
    assert split_items(response, 12) == wanted
    assert split_items(response, 12, "paper") == wanted


def test_references() -> None:
    joined = "a@@@@\nb\nb@@@@\nc"
    for scoring in ("corrected", "paper"):
        assert split_references(joined, 3, scoring) == ["a", "b\nb", "c"]
    assert split_references("a", 3) == ["a", "", ""]
    with pytest.raises(DataError, match=r"row 4 has 1 parts.*3 sub-tasks"):
        split_references("a", 3, "paper", row=4)
