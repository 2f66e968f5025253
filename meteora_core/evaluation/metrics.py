"""Accuracy of one response against one reference, in the authors' way and in the corrected way.

Every function here judges a single pair and returns a bool, or None where the reference itself gives nothing to compare with
(only in corrected scoring). Text metrics over many rows are in :mod:`meteora_core.evaluation.text_metrics`.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from typing import Any

from meteora_core.choices import Scoring

SCORINGS: tuple[Scoring, ...] = ("corrected", "paper")

_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w.)\]%])[-\u2212](?:[$€£¥]\ ?)?)?          # a minus that is not a subtraction, perhaps before a currency sign
    (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?            # 1,234,567.89
             |\d+(?:\.\d+)?                                  # 1234567.89
             |\.\d+)                                         # .89
    """,
    re.VERBOSE,
)
_WHOLE_NUMBER = re.compile(rf"[$€£¥]?(?:{_NUMBER.pattern})\s?%?", re.VERBOSE)
_ANSWER_IS = re.compile(r"answer\s*(?:is\b|:|=)", re.IGNORECASE)
_ANSWER_YES_NO = re.compile(r"answer\s*(?:is\b|:|=)\W{0,20}(yes|no)\b", re.IGNORECASE)
_LEADING_YES_NO = re.compile(r"\W{0,20}(yes|no)\b", re.IGNORECASE)
_ANY_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")

_PAPER_NUMBER = re.compile(r"-?\d+\.?\d*")
_PAPER_REFERENCE = re.compile(r"#### (-?[0-9.,]+)")
_PAPER_TRIGGER = "the answer is"


def as_text(value: Any) -> str:
    """Return ``value`` as text: None is the empty text, bytes are read as UTF-8, anything else is passed to ``str``."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    return str(value)


def _decimal(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] else value


def numbers(text: str) -> list[Decimal]:
    """Every number in ``text``, in order: ``-3``, ``1,234.50``, ``$5``, ``-$5``, ``50%``, ``.5``; a period at the end is no part of it.

    A minus directly after a letter, a digit or a closing bracket is a subtraction or a hyphen, not a sign: ``16-3`` holds 16 and 3.
    """
    return [_decimal(match) for match in _NUMBER.finditer(text)]


def whole_number(text: str) -> Decimal | None:
    """The number that ``text`` is, with an optional currency sign before and per cent sign after it; None when it is anything else."""
    match = _WHOLE_NUMBER.fullmatch(text.strip())
    return _decimal(match) if match else None


def final_number(text: str) -> Decimal | None:
    """The number that a worked solution ends in.

    In this order: the first number after the first ``####`` that has one in its line, the first number after the first "answer is" (or "answer:")
    that has one, the last number of the text.

    Returns:
        The number, or None when the text holds none.
    """
    for part in text.split("####")[1:]:
        match = _NUMBER.search(part.lstrip().split("\n", 1)[0])
        if match:
            return _decimal(match)
    trigger = _ANSWER_IS.search(text)
    if trigger:
        match = _NUMBER.search(text, trigger.end())
        if match:
            return _decimal(match)
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _decimal(last[0]) if last else None


def yes_or_no(text: str) -> str | None:
    """Whether an answer says ``"yes"`` or ``"no"``; only whole words count, so "Not" and "know" say neither.

    In this order: the first word of the text (behind punctuation), the word after "answer is" (or "answer:"), the first whole yes or no of the first sentence.

    Returns:
        ``"yes"``, ``"no"``, or None when the text says neither.
    """
    match = _LEADING_YES_NO.match(text) or _ANSWER_YES_NO.search(text)
    if match is None:
        end = _SENTENCE_END.search(text.lstrip())
        first_sentence = text.lstrip()[: end.start()] if end else text
        match = _ANY_YES_NO.search(first_sentence)
    return match[1].lower() if match else None


def exact_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response is the reference, whatever the case of its letters.

    Corrected scoring ignores white space at both ends, and compares numbers as numbers where both are nothing but a number.

    Returns:
        The verdict; None in corrected scoring when the reference is empty.
    """
    if scoring == "paper":
        return response.lower() == reference.lower()
    response, reference = response.strip(), reference.strip()
    if not reference:
        return None
    if response.lower() == reference.lower():
        return True
    wanted = whole_number(reference)
    return wanted is not None and whole_number(response) == wanted


def contains(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response contains the reference, whatever the case of its letters.

    Corrected scoring ignores white space at both ends of the reference; a reference that is nothing but a number must occur as a number
    (7 is not contained in 17).

    Returns:
        The verdict; None in corrected scoring when the reference is empty.
    """
    if scoring == "paper":
        return reference.lower() in response.lower()
    reference = reference.strip()
    if not reference:
        return None
    wanted = whole_number(reference)
    if wanted is not None:
        return any(number == wanted for number in numbers(response))
    return reference.lower() in response.lower()


def _paper_final_number(response: str) -> str | None:
    before, trigger, after = response.lower().partition(_PAPER_TRIGGER)
    # Text between the first and the second trigger counts, what follows the second does not.
    text = after.partition(_PAPER_TRIGGER)[0] if trigger else before
    found: list[str] = _PAPER_NUMBER.findall(text.replace(",", ""))
    if not found:
        return None
    return (found[0] if trigger else found[-1]).removesuffix(".")


def final_number_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response arrives at the reference's number (gsm8k; a reference ends in ``#### 42``).

    The authors compare text: the first number after "the answer is", else the last number, against the text after ``#### `` without its commas.
    Corrected scoring compares values, found by :func:`final_number` on both sides.

    Returns:
        The verdict; None in corrected scoring when the reference holds no number. Where the authors' code stops for lack of ``####``, paper scoring says False.
    """
    if scoring == "paper":
        wanted = _PAPER_REFERENCE.search(reference)
        return wanted is not None and _paper_final_number(response) == wanted[1].replace(",", "")
    value = final_number(reference)
    return None if value is None else final_number(response) == value


def yes_no_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether response and reference both say yes, or both say no (strategyqa).

    The authors look for the letters "yes" or "no" within the first five characters of both. Corrected scoring uses :func:`yes_or_no`.

    Returns:
        The verdict; None in corrected scoring when the reference says neither.
    """
    if scoring == "paper":
        head, wanted_head = response.lower()[:5], reference.lower()[:5]
        return any(word in wanted_head and word in head for word in ("yes", "no"))
    wanted = yes_or_no(reference)
    return None if wanted is None else yes_or_no(response) == wanted
