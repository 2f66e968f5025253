"""BLEU and ROUGE.

BLEU is sacrebleu's (13a tokens, exponential smoothing, case kept). ROUGE gives the figures of the ``rouge`` 1.0.1 package, to the last bit: sentences end
at every period, words are separated by white space, every distinct word or n-gram counts once, and ROUGE-L is the summary-level union of longest common
subsequences. The package fills a table of words x words in a dictionary and walks it by recursion, which stops at about a thousand words;
here the table is one integer of bits per reference word (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004) and the walk is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUGES: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")

_TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rouge:
    """One ROUGE figure, each value between 0 and 1."""

    recall: float
    precision: float
    f: float


def _f(overlap: int, hypothesis_count: int, reference_count: int) -> Rouge:
    precision = overlap / hypothesis_count if hypothesis_count else 0.0
    recall = overlap / reference_count if reference_count else 0.0
    return Rouge(recall, precision, 2.0 * ((precision * recall) / (precision + recall + 1e-8)))


def rouge_sentences(text: str) -> list[list[str]]:
    """Split a text into sentences of words as ``rouge`` 1.0.1 does; a sentence of nothing but white space holds one empty word.

    Returns:
        The sentences; an empty list for a text of nothing but periods, or none at all.
    """
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _steps(reference: list[str], masks: dict[str, int], full: int, row: int, first: int, last: int) -> list[int]:
    """The rows ``first`` to ``last`` of the table, from ``row``, the one before them. Bit j is 0 where the length grows from column j to column j + 1."""
    rows = []
    for index in range(first, last):
        matching = row & masks.get(reference[index], 0)
        row = ((row + matching) | (row - matching)) & full
        rows.append(row)
    return rows


def common_words(reference: list[str], hypothesis: list[str]) -> set[str]:
    """The distinct words of the longest common subsequence that ``rouge`` 1.0.1 finds.

    Among equally long ones the package's walk decides: from the ends, take a match, else drop the last reference word where that keeps the length
    and dropping the last hypothesis word would not, else drop the last hypothesis word. Hypothesis words that the reference lacks never change that
    walk and are left out.
    Memory is bounded: beyond 64 MiB only every k-th row is kept and the rows between are made again.

    Args:
        reference, hypothesis: The words of one sentence each, n and m of them. Time is n * m / 64 word operations.
    """
    known = set(reference)
    words = [word for word in hypothesis if word in known]
    found: set[str] = set()
    n, m = len(reference), len(words)
    if not m:
        return found
    masks: dict[str, int] = {}
    for column, word in enumerate(words):
        masks.setdefault(word, 0)
        masks[word] |= 1 << column
    full = (1 << m) - 1
    row_bytes = m // 8 + 32
    stride = n if n * row_bytes <= _TABLE_BYTES else max(1, math.isqrt(n))
    kept = {0: full}
    if stride < n:
        row = full
        for start in range(0, n - stride, stride):
            row = _steps(reference, masks, full, row, start, start + stride)[-1]
            kept[start + stride] = row
    start = max(kept)
    rows = _steps(reference, masks, full, kept[start], start, n)
    i, j = n, m
    while i and j:
        if i <= start:
            start -= stride
            rows = _steps(reference, masks, full, kept[start], start, start + stride)
        if reference[i - 1] == words[j - 1]:
            found.add(words[j - 1])
            i -= 1
            j -= 1
        elif rows[i - 1 - start] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return found


def rouge(response: str, reference: str) -> dict[str, Rouge] | None:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one response, as ``rouge`` 1.0.1 gives them.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``; None where the package raises an error: a side with no sentence, which is empty or nothing but periods.
    """
    hypotheses, references = rouge_sentences(response), rouge_sentences(reference)
    if not hypotheses or not references:
        return None
    words = [word for sentence in hypotheses for word in sentence]
    wanted = [word for sentence in references for word in sentence]
    unigrams, wanted_unigrams = set(words), set(wanted)
    bigrams, wanted_bigrams = set(pairwise(words)), set(pairwise(wanted))
    union: set[str] = set()
    for sentence in references:
        for candidate in hypotheses:
            union |= common_words(sentence, candidate)
    return {
        "rouge1": _f(len(unigrams & wanted_unigrams), len(unigrams), len(wanted_unigrams)),
        "rouge2": _f(len(bigrams & wanted_bigrams), len(bigrams), len(wanted_bigrams)),
        "rougeL": _f(len(union), len(unigrams), len(wanted_unigrams)),
    }


@cache
def _sacrebleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def bleu_counts(responses: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """What corpus BLEU is made of, row by row.

    Returns:
        (n, 10) int64: matching 1- to 4-grams, all 1- to 4-grams of the response, its length, the reference's length. Column sums give the corpus.
    """
    rows = []
    for response, reference in zip(responses, references, strict=True):
        made = _sacrebleu().sentence_score(response, [reference])
        rows.append([*made.counts, *made.totals, made.sys_len, made.ref_len])
    return np.array(rows, dtype=np.int64).reshape(-1, 10)


def bleu_of_counts(counts: NDArray[np.int64]) -> float:
    """BLEU, 0 to 100, of summed counts (10,), with sacrebleu's default exponential smoothing."""
    from sacrebleu.metrics import BLEU

    values = [int(value) for value in counts]
    return float(BLEU.compute_bleu(values[:4], values[4:8], values[8], values[9], smooth_method="exp").score)


def bleu_stderr(counts: NDArray[np.int64], resamples: int = 100, seed: int = 1234) -> float | None:
    """The bootstrap standard error of corpus BLEU: the standard deviation over ``resamples`` corpora of rows drawn with replacement.

    Args:
        counts: (n, 10), as :func:`bleu_counts` gives them.

    Returns:
        The standard error, or None for fewer than two rows or resamples.
    """
    n = len(counts)
    if n < 2 or resamples < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    return float(np.std([bleu_of_counts(row) for row in drawn @ counts], ddof=1))


def paper_bleu(responses: Sequence[str], references: Sequence[str]) -> float:
    """The authors' BLEU, 0 to 100: rows with an empty response are dropped, then the first response is scored against all references as alternatives.

    Args:
        responses: As they were cleaned; letters keep their case.
        references: As they are.
    """
    kept = [(response, reference) for response, reference in zip(responses, references, strict=True) if response]
    if not kept:
        return 0.0
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score([kept[0][0]], [[reference] for _, reference in kept]).score)
