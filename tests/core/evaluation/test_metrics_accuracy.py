"""Accuracy of one response against one reference, judged by hand for both scoring modes."""

from __future__ import annotations

from decimal import Decimal

import pytest

from meteora_core.evaluation.metrics import as_text, contains, exact_match, final_number, final_number_match, numbers, whole_number, yes_no_match, yes_or_no


@pytest.mark.parametrize(
    ("response", "reference", "paper", "corrected"),
    [
        ("Valid", "valid", True, True),
        ("valid", "invalid", False, False),
        (" valid\n", "valid", False, True),
        ("valid.", "valid", False, False),
        ("5.0", "5", False, True),
        ("1,000", "1000", False, True),
        ("5 apples", "5", False, False),
        ("", "valid", False, False),
        ("", "", True, None),
        ("  ", " ", False, None),
    ],
)
def test_exact(response: str, reference: str, paper: bool, corrected: bool | None) -> None:
    assert exact_match(response, reference, "paper") is paper
    assert exact_match(response, reference) is corrected


@pytest.mark.parametrize(
    ("response", "reference", "paper", "corrected"),
    [
        ("The answer is THE CAT.", "the cat", True, True),
        ("The answer is the dog.", "the cat", False, False),
        ("seventeen: 17", "7", True, False),
        ("There are 7 of them", "7", True, True),
        ("There are 1,000.", "1000", False, True),
        ("a cat", "cat\n", False, True),
        ("", "cat", False, False),
        ("anything", "", True, None),
    ],
)
def test_contains(response: str, reference: str, paper: bool, corrected: bool | None) -> None:
    assert contains(response, reference, "paper") is paper
    assert contains(response, reference) is corrected


@pytest.mark.parametrize(
    ("response", "reference", "paper", "corrected"),
    [
        ("6 * 7 = 42\n#### 42", "so\n#### 42", True, True),
        # The authors compare numbers as text.
        ("#### 42.0", "#### 42", False, True),
        ("It costs $1,234.", "#### 1,234", True, True),
        ("It is 42.", "#### 42.", False, True),
        ("#### -3", "#### -3", True, True),
        ("16-3", "#### 3", False, True),
        ("16-3", "#### -3", True, False),
        # The authors take the first number after "the answer is", and ignore what follows a second one.
        ("The answer is 5. Then 6.", "#### 5", True, True),
        ("The answer is. The answer is 5.", "#### 5", False, True),
        # The authors ignore the marker of the training data and take the last number, which is wrong.
        ("#### 7\nQ: what is 2 + 3?", "#### 7", False, True),
        ("50%", "#### 50", True, True),
        ("no number", "#### 50", False, False),
        ("", "#### 50", False, False),
        ("5", "five", False, None),
        ("5", "", False, None),
    ],
)
def test_final_number(response: str, reference: str, paper: bool, corrected: bool | None) -> None:
    assert final_number_match(response, reference, "paper") is paper
    assert final_number_match(response, reference) is corrected


@pytest.mark.parametrize(
    ("response", "reference", "paper", "corrected"),
    [
        ("Yes. It floats.", "Yes. Pears are light.", True, True),
        ("No.", "Yes. Pears are light.", False, False),
        # "no" is among the first five letters of another word.
        ("Not sure, yes.", "No. It sinks.", True, False),
        ("Know that it sinks", "No. It sinks.", True, False),
        # "yes" comes after the first five letters.
        ("I think yes", "Yes.", False, True),
        ("The answer is no.", "No.", False, True),
        ("**Yes**", "Yes.", True, True),
        ("", "Yes.", False, False),
        ("Yes", "Perhaps", False, None),
        ("Yes", "", False, None),
    ],
)
def test_yes_no(response: str, reference: str, paper: bool, corrected: bool | None) -> None:
    assert yes_no_match(response, reference, "paper") is paper
    assert yes_no_match(response, reference) is corrected


def test_numbers_in_order() -> None:
    text = "-3, 16-4, $5, -$6, $-7, 50%, 1,234.50, .5, 9. (8)-1 \u22122"
    assert numbers(text) == [Decimal(value) for value in ("-3", "16", "4", "5", "-6", "-7", "50", "1234.50", ".5", "9", "8", "1", "-2")]


def test_thousands_need_three_digits() -> None:
    assert numbers("12,34 and 1,2345") == [12, 34, 1, 2345]


@pytest.mark.parametrize(("text", "value"), [("42", 42), (" $1,000 ", 1000), ("-5%", -5), ("4 2", None), ("x4", None), ("", None), ("4.", None)])
def test_whole_number(text: str, value: int | None) -> None:
    assert whole_number(text) == value


def test_final_number_beyond_the_size_of_an_int_conversion() -> None:
    assert final_number("9" * 10_000) == Decimal("9" * 10_000)


def test_yes_or_no_prefers_the_stated_answer_and_stays_in_the_first_sentence() -> None:
    assert yes_or_no("There is no doubt. The answer is yes.") == "yes"
    assert yes_or_no("It may. There are no pears.") is None
    assert yes_or_no("\n\nno") == "no"


def test_as_text() -> None:
    assert [as_text(value) for value in (None, "a", b"\xff", 3)] == ["", "a", "\ufffd", "3"]
