"""Accuracy of one response against one reference, in paper scoring and in corrected scoring.

The verdict on a pair is a bool. In corrected scoring it is None if there is nothing in the reference to compare with. Metrics over many texts are in
:mod:`meteora_core.evaluation.text_metrics`.
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
    """Convert a value to text: None to the empty text, bytes by decoding UTF-8, anything else by ``str``."""
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
    """All numbers in a text, in order, in formats such as ``-3``, ``1,234.50``, ``$5``, ``-$5``, ``50%`` and ``.5``.

    A period at the end does not belong to a number. A minus directly after a letter, a digit or a closing bracket is a subtraction or a hyphen, not a sign:
    ``16-3`` contains 16 and 3.
    """
    return [_decimal(match) for match in _NUMBER.finditer(text)]


def whole_number(text: str) -> Decimal | None:
    """The number that the text consists of, optionally with a currency sign before or a per cent sign after it; None for any other text."""
    match = _WHOLE_NUMBER.fullmatch(text.strip())
    return _decimal(match) if match else None


def final_number(text: str) -> Decimal | None:
    """The final result of a worked solution.

    It is the first of these that exists: the first number after a ``####`` and in the same line, the first number after the first "answer is" (or "answer:"),
    the last number of the text.

    Returns:
        The number, or None if the text contains none.
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
    """Whether an answer says ``"yes"`` or ``"no"``. Only whole words count, so "Not" and "know" say neither.

    It is the first of these that is "yes" or "no": the first word of the text (after punctuation), the word after "answer is" (or "answer:"), the first such
    word in the first sentence.

    Returns:
        ``"yes"``, ``"no"``, or None if the text says neither.
    """
    match = _LEADING_YES_NO.match(text) or _ANSWER_YES_NO.search(text)
    if match is None:
        end = _SENTENCE_END.search(text.lstrip())
        first_sentence = text.lstrip()[: end.start()] if end else text
        match = _ANY_YES_NO.search(first_sentence)
    return match[1].lower() if match else None


def exact_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response equals the reference, regardless of letter case.

    Corrected scoring ignores white space at both ends, and compares values if both texts are numbers.

    Returns:
        The verdict; None if the reference is empty in corrected scoring.
    """
    if scoring == "paper":
        return response.lower() == reference.lower()
    response, reference = response.strip(), reference.strip()
    if not reference:
        return None
    if response.lower() == reference.lower():
        return True
    expected = whole_number(reference)
    return expected is not None and whole_number(response) == expected


def contains(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response contains the reference, regardless of letter case.

    Corrected scoring ignores white space at both ends of the reference. If the reference is a number, it must occur as a number (17 does not contain 7).

    Returns:
        The verdict; None if the reference is empty in corrected scoring.
    """
    if scoring == "paper":
        return reference.lower() in response.lower()
    reference = reference.strip()
    if not reference:
        return None
    expected = whole_number(reference)
    if expected is not None:
        return any(number == expected for number in numbers(response))
    return reference.lower() in response.lower()


def _paper_final_number(response: str) -> str | None:
    before, trigger, after = response.lower().partition(_PAPER_TRIGGER)
    # Only the text between the first and the second trigger counts.
    text = after.partition(_PAPER_TRIGGER)[0] if trigger else before
    candidates: list[str] = _PAPER_NUMBER.findall(text.replace(",", ""))
    if not candidates:
        return None
    return (candidates[0] if trigger else candidates[-1]).removesuffix(".")


def final_number_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether the response arrives at the reference's number (gsm8k, whose references end with a line such as ``#### 42``).

    The authors compare text: the first number after "the answer is", or else the last number, with the text after ``#### `` without commas. Corrected scoring
    compares the values that :func:`final_number` returns for both.

    Returns:
        The verdict; None if the reference contains no number in corrected scoring. A reference without ``####``, on which the authors' code fails, is False in
        paper scoring.
    """
    if scoring == "paper":
        expected = _PAPER_REFERENCE.search(reference)
        return expected is not None and _paper_final_number(response) == expected[1].replace(",", "")
    value = final_number(reference)
    return None if value is None else final_number(response) == value


def yes_no_match(response: str, reference: str, scoring: Scoring = "corrected") -> bool | None:
    """Whether response and reference both say yes, or both say no (strategyqa).

    The authors search the first five characters of both for "yes" or "no". Corrected scoring uses :func:`yes_or_no`.

    Returns:
        The verdict; None if the reference says neither in corrected scoring.
    """
    if scoring == "paper":
        head, expected_head = response.lower()[:5], reference.lower()[:5]
        return any(word in expected_head and word in head for word in ("yes", "no"))
    expected = yes_or_no(reference)
    return None if expected is None else yes_or_no(response) == expected
