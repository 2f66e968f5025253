"""BLEU and ROUGE.

BLEU is sacrebleu's (13a tokens, exponential smoothing, case-sensitive). ROUGE equals that of the ``rouge`` 1.0.1 package to the last bit: sentences end at
every period, words are separated by white space, every distinct word or n-gram counts once, and ROUGE-L is the summary-level union of longest common
subsequences. The package fills a table of words by words in a dictionary and walks it recursively, which fails for texts of more than about a thousand
words. This module stores the table as one integer of bits per reference word (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004) and walks it
in a loop.
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
    """Recall, precision and F-measure of one ROUGE metric, each between 0 and 1."""

    recall: float
    precision: float
    f: float


def _f(overlap: int, hypothesis_count: int, reference_count: int) -> Rouge:
    precision = overlap / hypothesis_count if hypothesis_count else 0.0
    recall = overlap / reference_count if reference_count else 0.0
    return Rouge(recall, precision, 2.0 * ((precision * recall) / (precision + recall + 1e-8)))


def rouge_sentences(text: str) -> list[list[str]]:
    """Split a text into sentences of words as ``rouge`` 1.0.1 does. A sentence of white space only consists of one empty word.

    Returns:
        The sentences; an empty list for an empty text or one of periods only.
    """
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _steps(reference: list[str], masks: dict[str, int], full: int, row: int, first: int, last: int) -> list[int]:
    """Compute the table's rows after ``row``, for the reference words ``first`` to ``last`` (excluded).

    Bit j of a row is 0 if the length of the common subsequence grows from column j to column j + 1.
    """
    rows = []
    for index in range(first, last):
        matching = row & masks.get(reference[index], 0)
        row = ((row + matching) | (row - matching)) & full
        rows.append(row)
    return rows


def common_words(reference: list[str], hypothesis: list[str]) -> set[str]:
    """The distinct words of the longest common subsequence that ``rouge`` 1.0.1 finds.

    If several subsequences have the same length, the package's walk from the ends of both sentences decides: it takes a match; otherwise it drops the last
    reference word if that keeps the length and dropping the last hypothesis word does not; otherwise it drops the last hypothesis word. Hypothesis words that
    the reference lacks do not influence the walk and are left out.

    Memory is bounded: if the table exceeds 64 MiB, only every k-th row is stored and the rows between are computed again.

    Args:
        reference: Words of one sentence of the reference.
        hypothesis: Words of one sentence of the response. With n and m words, the time is n * m / 64 operations on machine words.
    """
    reference_words = set(reference)
    words = [word for word in hypothesis if word in reference_words]
    common: set[str] = set()
    n, m = len(reference), len(words)
    if not m:
        return common
    masks: dict[str, int] = {}
    for column, word in enumerate(words):
        masks.setdefault(word, 0)
        masks[word] |= 1 << column
    full = (1 << m) - 1
    row_bytes = m // 8 + 32
    stride = n if n * row_bytes <= _TABLE_BYTES else max(1, math.isqrt(n))
    stored = {0: full}
    if stride < n:
        row = full
        for start in range(0, n - stride, stride):
            row = _steps(reference, masks, full, row, start, start + stride)[-1]
            stored[start + stride] = row
    start = max(stored)
    rows = _steps(reference, masks, full, stored[start], start, n)
    i, j = n, m
    while i and j:
        if i <= start:
            start -= stride
            rows = _steps(reference, masks, full, stored[start], start, start + stride)
        if reference[i - 1] == words[j - 1]:
            common.add(words[j - 1])
            i -= 1
            j -= 1
        elif rows[i - 1 - start] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return common


def rouge(response: str, reference: str) -> dict[str, Rouge] | None:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one response, as ``rouge`` 1.0.1 computes them.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``; None if one of the texts is empty or consists of periods only, for which the package raises an error.
    """
    hypotheses, references = rouge_sentences(response), rouge_sentences(reference)
    if not hypotheses or not references:
        return None
    words = [word for sentence in hypotheses for word in sentence]
    reference_words = [word for sentence in references for word in sentence]
    unigrams, reference_unigrams = set(words), set(reference_words)
    bigrams, reference_bigrams = set(pairwise(words)), set(pairwise(reference_words))
    union: set[str] = set()
    for sentence in references:
        for candidate in hypotheses:
            union |= common_words(sentence, candidate)
    return {
        "rouge1": _f(len(unigrams & reference_unigrams), len(unigrams), len(reference_unigrams)),
        "rouge2": _f(len(bigrams & reference_bigrams), len(bigrams), len(reference_bigrams)),
        "rougeL": _f(len(union), len(unigrams), len(reference_unigrams)),
    }


@cache
def _sacrebleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def bleu_counts(responses: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """The counts of each row from which corpus BLEU is computed.

    Returns:
        Counts, int64 (rows, 10): matching 1- to 4-grams, all 1- to 4-grams of the response, and the lengths of response and reference. The sum over the rows
        gives the counts of the corpus.
    """
    rows = []
    for response, reference in zip(responses, references, strict=True):
        bleu = _sacrebleu().sentence_score(response, [reference])
        rows.append([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len])
    return np.array(rows, dtype=np.int64).reshape(-1, 10)


def bleu_of_counts(counts: NDArray[np.int64]) -> float:
    """Corpus BLEU (0 to 100) from summed counts, int64 (10,), with sacrebleu's default exponential smoothing."""
    from sacrebleu.metrics import BLEU

    values = [int(value) for value in counts]
    return float(BLEU.compute_bleu(values[:4], values[4:8], values[8], values[9], smooth_method="exp").score)


def bleu_stderr(counts: NDArray[np.int64], resamples: int = 100, seed: int = 1234) -> float | None:
    """Bootstrap standard error of corpus BLEU: the standard deviation over corpora whose rows are drawn with replacement.

    Args:
        counts: Counts of each row, int64 (rows, 10), as :func:`bleu_counts` returns them.
        resamples: Number of corpora.
        seed: Seed of the random generator.

    Returns:
        The standard error, or None for fewer than two rows or resamples.
    """
    n = len(counts)
    if n < 2 or resamples < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    return float(np.std([bleu_of_counts(row) for row in drawn @ counts], ddof=1))


def paper_bleu(responses: Sequence[str], references: Sequence[str]) -> float:
    """The authors' BLEU (0 to 100), which scores only the first non-empty response, against the references of all rows with a non-empty response.

    Args:
        responses: Cleaned responses; letter case matters.
        references: Reference for each response.
    """
    pairs = [(response, reference) for response, reference in zip(responses, references, strict=True) if response]
    if not pairs:
        return 0.0
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score([pairs[0][0]], [[reference] for _, reference in pairs]).score)
