"""Composite tasks: one response that answers several numbered questions."""

from __future__ import annotations

import re

from meteora_core.choices import Scoring
from meteora_core.errors import DataError

SEPARATOR = "@@@@\n"
"""What joins the references of a composite row."""

_MARKER = re.compile(r"^[ \t]*(\d{1,4})\.(?=\s|$)", re.MULTILINE)


def split_references(reference: str, count: int, scoring: Scoring = "corrected", *, row: int = 0) -> list[str]:
    """Split a composite row's reference into those of its sub-tasks.

    Args:
        reference: The sub-tasks' references, joined by ``@@@@`` and a line end.
        count: How many sub-tasks there are.
        scoring: Corrected scoring pads what is missing with empty references, which are counted and left out of the metrics.
        row: The row's number, for the error.

    Raises:
        DataError: In paper scoring, when parts are missing; the authors' code stops there.
    """
    parts = reference.split(SEPARATOR)
    if len(parts) < count and scoring == "paper":
        raise DataError(f"the reference of row {row} has {len(parts)} parts, and the composite has {count} sub-tasks")
    return [*parts, *[""] * count][:count]


def split_items(response: str, count: int, scoring: Scoring = "corrected") -> list[str]:
    """Split a composite response into its numbered answers.

    Paper scoring: item i is what follows the first ``i. `` anywhere (the one of ``12. `` counts for item 2), to the end of that line.

    Corrected scoring: item i begins at its number and period at the start of a line. Its place is the first such line after the beginning of item
    i - 1, or the first in the whole response if none comes after. An item ends where the next one begins, so it may have many lines, and a numbered
    list of its own as long as the number that comes next is not in it.

    Args:
        response: The response text.
        count: How many items are wanted.

    Returns:
        ``count`` texts; an item that is not there is empty.
    """
    if scoring == "paper":
        return [_paper_item(response, index) for index in range(1, count + 1)]
    places: dict[int, list[tuple[int, int]]] = {}
    for match in _MARKER.finditer(response):
        number = int(match[1])
        if 1 <= number <= count:
            places.setdefault(number, []).append(match.span())
    chosen: dict[int, tuple[int, int]] = {}
    taken: int = -1
    for number in range(1, count + 1):
        spans = places.get(number)
        if spans:
            chosen[number] = next((span for span in spans if span[0] > taken), spans[0])
            taken = chosen[number][0]
    starts = sorted(span[0] for span in chosen.values())
    ends = dict(zip(starts, [*starts[1:], len(response)][: len(starts)], strict=True))
    return [response[chosen[number][1] : ends[chosen[number][0]]].strip() if number in chosen else "" for number in range(1, count + 1)]


def _paper_item(response: str, number: int) -> str:
    _, marker, rest = response.partition(f"{number}. ")
    return rest.partition("\n")[0] if marker else ""
