"""BLEU and ROUGE, compared with figures computed by hand and with the packages that define them."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from rouge import Rouge as Package
from sacrebleu.metrics import BLEU

from meteora_core.evaluation import text_metrics
from meteora_core.evaluation.text_metrics import bleu_counts, bleu_of_counts, bleu_stderr, common_words, paper_bleu, rouge

_NAMES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}


def test_rouge_by_hand() -> None:
    # The distinct words are {the, cat, sat} and {the, cat, ate, it}, with two in common. Of 2 and 3 pairs, (the, cat) is common. The longest common
    # subsequence is "the cat".
    made = rouge("the cat sat", "the cat ate it")
    assert made is not None
    assert (made["rouge1"].precision, made["rouge1"].recall) == (2 / 3, 2 / 4)
    assert (made["rouge2"].precision, made["rouge2"].recall) == (1 / 2, 1 / 3)
    assert (made["rougeL"].precision, made["rougeL"].recall) == (2 / 3, 2 / 4)
    assert made["rouge1"].f == pytest.approx(4 / 7, abs=1e-7)


def test_rouge_l_is_the_union_over_sentences() -> None:
    # "c a" and "a b c" have only one word in common in the same order, but as two sentences both words are found.
    one, two = rouge("c a", "a b c"), rouge("c. a", "a b c")
    assert one is not None
    assert two is not None
    assert one["rougeL"].recall == 1 / 3
    assert two["rougeL"].recall == 2 / 3


@pytest.mark.parametrize("text", ["", ".", "....."])
def test_no_sentence_no_rouge(text: str) -> None:
    assert rouge(text, "a") is None
    assert rouge("a", text) is None
    with pytest.raises(ValueError, match="empty"):
        Package().get_scores(text, "a")


def _text(draw: random.Random, words: int, vocabulary: int) -> str:
    gaps = [" ", " ", " ", " ", ".", " . ", "\n", "  "]
    return "".join(f"w{draw.randrange(vocabulary)}{draw.choice(gaps)}" for _ in range(words))


@pytest.mark.parametrize("table_bytes", [text_metrics._TABLE_BYTES, 1], ids=["whole", "rows-made-again"])
def test_rouge_equals_the_package(table_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "_TABLE_BYTES", table_bytes)
    draw = random.Random(5)
    package = Package()
    for _ in range(400):
        vocabulary = draw.choice([2, 4, 30])
        response, reference = _text(draw, draw.randrange(1, 30), vocabulary), _text(draw, draw.randrange(1, 50), vocabulary)
        made = rouge(response, reference)
        assert made is not None
        for name, wanted in package.get_scores(response, reference)[0].items():
            got = made[_NAMES[name]]
            assert (got.recall, got.precision, got.f) == (wanted["r"], wanted["p"], wanted["f"])


PACKAGE_ROUGE_L = """
import json, sys
from rouge import Rouge
response, reference = json.load(sys.stdin)
try:
    Rouge().get_scores(response, reference)
    sys.exit("the package managed it")
except RecursionError:
    sys.setrecursionlimit(20_000)
print(json.dumps(Rouge().get_scores(response, reference)[0]["rouge-l"]["f"]))
"""
"""Runs in a separate process, because after torch has compiled code, Python's calls use the C stack, whose limit cannot be raised."""


def test_rouge_equals_the_package_beyond_its_recursion_limit() -> None:
    draw = random.Random(6)
    response, reference = (" ".join(f"w{draw.randrange(300)}" for _ in range(700)) for _ in range(2))
    command = [sys.executable, "-c", PACKAGE_ROUGE_L]
    wanted = json.loads(subprocess.run(command, input=json.dumps([response, reference]), capture_output=True, text=True, check=True).stdout)
    made = rouge(response, reference)
    assert made is not None
    assert made["rougeL"].f == wanted


def test_long_texts_are_quick() -> None:
    words = [f"w{index % 97}" for index in range(20_000)]
    assert common_words(words, words) == set(words)


def test_bleu_by_hand() -> None:
    # The response has one word too many: the precisions are 5/6, 4/5, 3/4 and 2/3, without a brevity penalty.
    counts = bleu_counts(["a b c d e f"], ["a b c d e"])
    assert counts.tolist() == [[5, 4, 3, 2, 6, 5, 4, 3, 6, 5]]
    assert bleu_of_counts(counts[0]) == pytest.approx(100 * math.prod([5 / 6, 4 / 5, 3 / 4, 2 / 3]) ** 0.25)


def test_bleu_equals_sacrebleu() -> None:
    draw = random.Random(7)
    responses, references = ([_text(draw, draw.randrange(0, 30), 12) for _ in range(60)] for _ in range(2))
    assert bleu_of_counts(bleu_counts(responses, references).sum(axis=0)) == BLEU().corpus_score(responses, [references]).score


def test_paper_bleu_scores_the_first_response_against_every_reference() -> None:
    # The first non-empty response is that of the second row. It equals the reference of the third row, and nothing else counts.
    assert paper_bleu(["", "a b c d", "x"], ["a b", "q", "a b c d"]) == pytest.approx(100.0)
    # The reference of a row with an empty response does not count.
    assert paper_bleu(["", "a b c d"], ["a b c d", "q r s t"]) == 0.0
    assert paper_bleu(["", ""], ["a", "b"]) == 0.0
    assert paper_bleu([], []) == 0.0


def test_bleu_stderr_is_repeatable_and_like_the_spread() -> None:
    draw = random.Random(8)
    references = [" ".join(f"w{draw.randrange(20)}" for _ in range(12)) for _ in range(100)]
    responses = [text if draw.random() < 0.5 else "x y z" for text in references]
    counts = bleu_counts(responses, references)
    first = bleu_stderr(counts)
    assert first is not None
    assert first == bleu_stderr(counts)
    assert 2 < first < 10
    assert bleu_stderr(np.repeat(counts[:1], 9, axis=0)) == pytest.approx(0.0)
    assert bleu_stderr(counts[:1]) is None
