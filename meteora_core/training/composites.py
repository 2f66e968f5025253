"""Training rows that look like composites: several tasks in one prompt, numbered answers, gate labels by segment.

This extends the paper (``--composite-rows``). If the adapters of a small base model were trained on single questions only, the model tends to stop
after the first answer. The texts have the format of :mod:`meteora_core.data.composite` and consist of train rows only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from meteora_core.data.composite import FEWEST_CANDIDATES, SHORT_SHARE, compose, lead_text, numbered
from meteora_core.data.rows import Row
from meteora_core.errors import UsageError
from meteora_core.training.encoding import Encoded, Labelled, encode_labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 4096
"""Maximum number of different composites of one run; a longer run repeats them."""

MOST_EXAMPLES = 2
TRIES = 8
"""Number of attempts to draw a composite that is short enough, with fewer parts each time, before it is cut."""

Part = tuple[int, Row]
"""The index of an adapter, and a row that belongs to it."""


def composite_text(parts: Sequence[Part], examples: Sequence[Sequence[Row]] = ()) -> Labelled:
    """Build one composite to train on.

    The prompt is the one that the data builder would make from these rows and solved examples. The response lists the answers as "1. ..." to "n. ...",
    one per line. Every prompt part and every answer line (including its number and line end) is labelled with the index of its task, also in the
    solved examples; the sentences between them belong to no adapter.

    Args:
        parts: The questions, each from a different task.
        examples: Solved examples, each with one row per task of ``parts``, in the same order.
    """
    tasks = [task for task, _ in parts]
    lead = lead_text(examples)
    spans: list[tuple[int, int, int]] = []
    at = 0
    for rows in examples:
        answers = _answer_lines(rows)
        questions = "".join(row.prompt + "\n" for row in rows)
        at = lead.index(questions + "".join(answers), at)
        for task, row in zip(tasks, rows, strict=True):
            spans.append((at, at + len(row.prompt), task))
            at += len(row.prompt) + 1
        for task, line in zip(tasks, answers, strict=True):
            spans.append((at, at + len(line), task))
            at += len(line)
    at = len(lead)
    for task, row in parts:
        spans.append((at, at + len(row.prompt), task))
        at += len(row.prompt) + 2
    prompt = compose([row for _, row in parts], lead).prompt
    lines = _answer_lines([row for _, row in parts])
    at = len(prompt)
    for task, line in zip(tasks, lines, strict=True):
        spans.append((at, at + len(line), task))
        at += len(line)
    return Labelled(prompt, "".join(lines).removesuffix("\n"), tuple(spans))


def _answer_lines(rows: Sequence[Row]) -> list[str]:
    """The text of :func:`meteora_core.data.composite.numbered`, one string per answer (an answer may contain line breaks)."""
    answers = [row.response.strip() for row in rows]
    ends = [len(numbered(answers[:count])) for count in range(len(answers) + 1)]
    whole = numbered(answers)
    return [whole[begin:end] for begin, end in pairwise(ends)]


def make_composites(rows: Sequence[Sequence[Row]], tokenizer: PreTrainedTokenizerBase, *, count: int, largest: int, max_length: int, seed: int) -> Encoded:
    """Draw composites of 2 to ``largest`` tasks; about half of them have one or two solved examples before the questions.

    Tasks, their order, rows and examples are drawn at random. As in the data builder, the examples come from the shortest quarter of a task's rows with
    one-line answers. A composite that is too long is drawn again, with fewer examples and then fewer tasks; if it is still too long, it is cut like
    any row.

    Args:
        rows: Per adapter, its train rows.
        tokenizer: The base model's tokenizer.
        count: Number of composites.
        largest: Maximum number of tasks in a composite, at least 2; it is limited to the number of adapters.
        max_length: Maximum length of a sequence in tokens.
        seed: Seed of every random choice.

    Raises:
        UsageError: There are fewer than two adapters.
    """
    if len(rows) < 2:
        raise UsageError("composites need at least two adapters", hint="leave out --composite-rows, or train more adapters")
    rng = random.Random(f"composite rows {seed}")
    able = [_short_rows(task_rows) for task_rows in rows]
    texts: list[Labelled] = []
    while len(texts) < count:
        most, examples = min(largest, len(rows)), rng.randint(1, MOST_EXAMPLES) if rng.random() < 0.5 else 0
        for _ in range(TRIES):
            n = rng.randint(2, most)
            text = _draw(rows, able, rng, n, examples)
            if len(tokenizer(text.prompt + text.response)["input_ids"]) < max_length:
                break
            examples, most = max(0, examples - 1), max(2, n - (examples == 0))
        texts.append(text)
    return encode_labelled(texts, tokenizer, max_length)


def _draw(rows: Sequence[Sequence[Row]], able: Sequence[Sequence[Row]], rng: random.Random, n: int, examples: int) -> Labelled:
    tasks = rng.sample(range(len(rows)), n)
    if any(len(able[task]) < examples for task in tasks):
        examples = 0
    drawn = [rng.sample(able[task], examples) for task in tasks]
    parts = [(task, rng.choice(rows[task])) for task in tasks]
    return composite_text(parts, [[member[number] for member in drawn] for number in range(examples)])


def _short_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that can serve as solved examples; see :func:`meteora_core.data.composite.draw_examples`."""
    able = sorted((row for row in rows if row.response.strip() and "\n" not in row.response.strip()), key=lambda row: len(row.prompt) + len(row.response))
    return able[: max(int(SHORT_SHARE * len(able)), FEWEST_CANDIDATES)]
