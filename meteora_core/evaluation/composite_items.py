"""Splitting of composite responses, which answer several numbered questions, and of their references."""

from __future__ import annotations

import re

from meteora_core.choices import Scoring
from meteora_core.errors import DataError

SEPARATOR = "@@@@\n"
"""Separator between the references of a composite row."""

_MARKER = re.compile(r"^[ \t]*(\d{1,4})\.(?=\s|$)", re.MULTILINE)


def split_references(reference: str, count: int, scoring: Scoring = "corrected", *, row: int = 0) -> list[str]:
    """Split the reference of a composite row into the references of its sub-tasks.

    Args:
        reference: References of the sub-tasks, joined by ``@@@@`` and a line end.
        count: Number of sub-tasks.
        scoring: Scoring mode. Corrected scoring replaces missing references by empty ones, which are counted and left out of the metrics.
        row: Index of the row, for the error message.

    Raises:
        DataError: References are missing and the mode is paper scoring, as in the authors' code.
    """
    parts = reference.split(SEPARATOR)
    if len(parts) < count and scoring == "paper":
        raise DataError(f"the reference of row {row} has {len(parts)} parts, and the composite has {count} sub-tasks")
    return [*parts, *[""] * count][:count]


def split_items(response: str, count: int, scoring: Scoring = "corrected") -> list[str]:
    """Split a composite response into its numbered answers.

    In paper scoring, item i is the text between the first ``i. `` anywhere in the response (``12. `` also counts as ``2. ``) and the end of that line.

    In corrected scoring, item i begins with its number and a period at the start of a line. This is the first such line after the beginning of item i - 1, or
    the first in the whole response if there is none after it. An item ends where the next one begins, so it may have several lines, and even contain a
    numbered list that does not use the number of the next item.

    Args:
        response: The response text.
        count: Number of items.
        scoring: Scoring mode, ``"corrected"`` or ``"paper"``.

    Returns:
        ``count`` texts; a missing item is empty.
    """
    if scoring == "paper":
        return [_paper_item(response, index) for index in range(1, count + 1)]
    candidates: dict[int, list[tuple[int, int]]] = {}
    for match in _MARKER.finditer(response):
        number = int(match[1])
        if 1 <= number <= count:
            candidates.setdefault(number, []).append(match.span())
    markers: dict[int, tuple[int, int]] = {}
    previous: int = -1
    for number in range(1, count + 1):
        spans = candidates.get(number)
        if spans:
            markers[number] = next((span for span in spans if span[0] > previous), spans[0])
            previous = markers[number][0]
    starts = sorted(span[0] for span in markers.values())
    ends = dict(zip(starts, [*starts[1:], len(response)][: len(starts)], strict=True))
    return [response[markers[number][1] : ends[markers[number][0]]].strip() if number in markers else "" for number in range(1, count + 1)]


def _paper_item(response: str, number: int) -> str:
    _, marker, rest = response.partition(f"{number}. ")
    return rest.partition("\n")[0] if marker else ""
