"""Extraction of responses from outputs."""

from __future__ import annotations

from typing import Any

import pytest

from meteora_core.evaluation import clean_response
from meteora_core.evaluation.clean import answer_only

PROMPT = "[INST] Is the argument valid? [/INST]\n"


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (PROMPT + "Valid", "Valid"),
        (PROMPT + "  Valid \n", "Valid"),
        ("<s>" + PROMPT + "Valid</s>", "Valid"),
        ("<s> " + PROMPT + "Valid</s></s></s>", "Valid"),
        ("<|begin_of_text|>" + PROMPT + "Valid<|end_of_text|>junk", "Valid"),
        (f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\nValid<|im_end|>\n", "Valid"),
        (f"<|start_header_id|>user<|end_header_id|>\n\n{PROMPT}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nValid<|eot_id|>", "Valid"),
        (PROMPT + "Valid " + PROMPT + "again", "Valid [INST] Is the argument valid? [/INST]\nagain".replace(PROMPT.strip() + "\n", "\n")),
        (PROMPT, ""),
        (PROMPT.strip(), ""),
        (PROMPT.strip() + " Valid", "Valid"),
        # Decoding changed the prompt, so only its end is searched for, and white space is kept.
        ("[INST] Is the argument  valid? [/INST]\n Valid", " Valid"),
        ("[INST] a [/INST]\n[INST] b [/INST]\nValid</s>", "Valid"),
        # The output does not repeat the prompt.
        ("Valid", "Valid"),
        (" Valid<|im_end|>", " Valid"),
        ("", ""),
        (None, ""),
        ("1 < 2 and <b>bold</b>", "1 < 2 and <b>bold</b>"),
    ],
)
def test_corrected(output: str | None, wanted: str) -> None:
    assert clean_response("formal_fallacies_syllogisms_negation", output, PROMPT) == wanted


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (PROMPT + " Valid \n", "valid"),
        (PROMPT + "Valid</s>", "valid</s>"),
        (PROMPT + "A\n" + PROMPT + "B", "a\n\nb"),
        ("[INST] other [/INST]\n Valid", " valid"),
        (PROMPT.strip() + " Valid", PROMPT.strip() + " Valid"),
        (" Valid", " Valid"),
    ],
)
def test_paper(output: str, wanted: str) -> None:
    assert clean_response("winowhy", output, PROMPT, scoring="paper") == wanted


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (PROMPT + "The argument is Invalid.", "invalid"),
        (PROMPT + "valid, not invalid", "invalid"),
        (PROMPT + "VALID!", "valid"),
        (PROMPT + "I do not know", "illegal answer"),
        (PROMPT, "illegal answer"),
        # If the prompt is not found, the output is not lower-cased, and the word may come from the prompt itself.
        ("Valid", "illegal answer"),
        ("INVALID and valid", "valid"),
        (PROMPT.strip() + " yes", "valid"),
    ],
)
def test_paper_reads_a_verdict_out_of_formal_fallacies(output: str, wanted: str) -> None:
    task = "formal_fallacies_syllogisms_negation"
    assert clean_response(task, output, PROMPT, scoring="paper") == wanted
    assert clean_response("vitaminc_fact_verification", output, PROMPT, scoring="paper") == clean_response("winowhy", output, PROMPT, scoring="paper")


@pytest.mark.parametrize("prompt", ["", " ", "\n", None, "</s>", "<s>"])
@pytest.mark.parametrize("output", ["", None, "\ud800", "\x00", "</s>", "<s>", "<" * 10_000, "a </s> b", "[INST]", "[/INST]\n"])
def test_odd_input_gives_text(output: Any, prompt: Any) -> None:
    for scoring in ("corrected", "paper"):
        assert isinstance(clean_response("gsm8k", output, prompt, scoring=scoring), str)


def test_an_answer_ends_where_the_next_request_begins() -> None:
    assert answer_only("42\n[INST] more [/INST]\n43") == "42\n"
    assert answer_only("42") == "42"
