"""Training rows with several questions in one prompt and numbered answers: of several tasks (composites), or all of one task (lists).

Both extend the paper (``--composite-rows``, ``--list-rows``). If the adapters of a small base model were trained on single questions only, the model
tends to stop after the first answer. The texts have the format of :mod:`meteora_core.data.composite` and consist of train rows only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from meteora_core.data.composite import FEWEST_CANDIDATES, SHORT_SHARE, compose, lead_text, numbered
from meteora_core.data.rows import Row
from meteora_core.errors import UsageError
from meteora_core.training.encoding import Encoded, Labelled, RowsOnDemand, TrainRow, encode_labelled, row_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 4096
"""Maximum number of different composites of one run; a longer run repeats them."""

LISTS = 256
"""Maximum number of different lists of one task; a longer run repeats them."""

MOST_EXAMPLES = 2
HALVINGS = 4
"""How often the rows that a composite or a list is drawn from are halved, to the shorter ones, until it is short enough."""

_LEAD, _NUMBER = 24, 4
"""An estimate of the tokens of a list that are not in its rows: the sentences around them, and the number and the line ends of each."""

Part = tuple[int, Row]
"""The index of an adapter, and a row that belongs to it."""


def composite_text(parts: Sequence[Part], examples: Sequence[Sequence[Row]] = ()) -> Labelled:
    """Build one composite to train on; it is a list if all parts belong to one task.

    The prompt is the one that the data builder would make from these rows and solved examples. The response lists the answers as "1. ..." to "n. ...",
    one per line. Every prompt part and every answer line (including its number and line end) is labelled with the index of its task, also in the
    solved examples; the sentences between them belong to no adapter.

    Args:
        parts: The questions.
        examples: Solved examples, each with one row for each of ``parts``, of the same task and in the same order.
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
    one-line answers. A composite that is too long is drawn again: with fewer examples, then from the shorter half of each task's rows, the shortest quarter
    and so on, and only then with fewer tasks; if two are still too long, it is cut like any row.

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
    able = [[task_rows[place] for place in _short_rows(task_rows)] for task_rows in rows]
    by_length = [sorted(task_rows, key=lambda row: len(row.prompt) + len(row.response)) for task_rows in rows]
    shares = [0.5**halvings for halvings in range(HALVINGS + 1)]
    shortest_rows = {share: [task_rows[: max(1, round(share * len(task_rows)))] for task_rows in by_length] for share in shares}
    texts: list[Labelled] = []
    while len(texts) < count:
        for n, examples, shortest in _sizes(rng, min(largest, len(rows))):
            text = _draw(shortest_rows[shortest], able, rng, n, examples)
            if len(tokenizer(text.prompt + text.response)["input_ids"]) < max_length:
                break
        texts.append(text)
    return encode_labelled(texts, tokenizer, max_length)


def _draw(rows: Sequence[Sequence[Row]], able: Sequence[Sequence[Row]], rng: random.Random, n: int, examples: int) -> Labelled:
    """Draw a composite of ``n`` tasks from the rows of each adapter, and its solved examples from ``able``."""
    tasks = rng.sample(range(len(rows)), n)
    if any(len(able[task]) < examples for task in tasks):
        examples = 0
    drawn = [rng.sample(able[task], examples) for task in tasks]
    parts = [(task, rng.choice(rows[task])) for task in tasks]
    return composite_text(parts, [[member[number] for member in drawn] for number in range(examples)])


def _sizes(rng: random.Random, most: int) -> Iterator[tuple[int, int, float]]:
    """Numbers of questions (2 to ``most``) and of solved examples, and the share of the rows to draw from, the shortest ones, until a text is short enough."""
    n, examples = rng.randint(2, most), rng.randint(1, MOST_EXAMPLES) if rng.random() < 0.5 else 0
    for fewer in range(examples, 0, -1):
        yield n, fewer, 1.0
    for halvings in range(HALVINGS + 1):
        yield n, 0, 0.5**halvings
    for fewer in range(n - 1, 1, -1):
        yield fewer, 0, 0.5**HALVINGS


def _short_rows(rows: Sequence[Row]) -> list[int]:
    """The indices of the rows that can serve as solved examples; see :func:`meteora_core.data.composite.draw_examples`."""
    able = [place for place, row in enumerate(rows) if row.response.strip() and "\n" not in row.response.strip()]
    able.sort(key=lambda place: len(rows[place].prompt) + len(rows[place].response))
    return able[: max(int(SHORT_SHARE * len(able)), FEWEST_CANDIDATES)]


@dataclass(frozen=True)
class ListRows:
    """How many of a task's training rows are lists of its questions, and how large these are.

    Attributes:
        share: Share of the training rows that are lists, below 1.
        largest: Maximum number of questions in a list, at least 2.
        max_length: Maximum length of a sequence in tokens.
        seed: Seed of every random choice.
    """

    share: float
    largest: int
    max_length: int
    seed: int

    def count(self, singles: int) -> int:
        """The number of lists to add to ``singles`` rows."""
        return round(self.share / (1 - self.share) * singles)


def list_texts(rows: Sequence[Row], lengths: Sequence[int], adapter: int, lists: ListRows) -> list[Labelled]:
    """Draw lists of 2 to ``lists.largest`` questions of one task; about half of them have one or two solved examples before the questions.

    Rows and examples are drawn at random, and no question is asked twice in a list. The examples come from the same rows as those of composites. A list
    that is too long is drawn again: with fewer examples, then from the shorter half of the rows, the shortest quarter and so on, and only then with fewer
    questions. So lists of tasks with long questions have many questions too; an adapter whose lists nearly all have two questions learns to end after the
    second answer. At most :data:`LISTS` lists are made; :func:`with_lists` repeats them.

    Args:
        rows: The train rows of the task.
        lengths: Number of tokens of each row.
        adapter: Gate label of the questions and the answers.
        lists: Share and size of the lists.

    Raises:
        UsageError: There are fewer than two rows.
    """
    if len(rows) < 2:
        raise UsageError("a list of questions needs at least two train rows", hint="leave out --list-rows, or use more rows")
    rng = random.Random(f"list rows {lists.seed}")
    able, texts = _short_rows(rows), list[Labelled]()
    by_length = sorted(range(len(rows)), key=lambda place: lengths[place])
    for _ in range(min(LISTS, lists.count(len(rows)))):
        for n, examples, shortest in _sizes(rng, min(lists.largest, len(rows))):
            pool = by_length[: max(n, FEWEST_CANDIDATES, round(shortest * len(rows)))]
            solved, asked = rng.sample(able, min(examples, len(able) // n) * n), rng.sample(pool, n)
            if _LEAD + sum(lengths[place] + _NUMBER for place in (*solved, *asked)) <= lists.max_length:
                break
        else:
            solved, asked = [], rng.sample(able if len(able) > 1 else range(len(rows)), 2)
        shown = [[rows[place] for place in solved[start : start + len(asked)]] for start in range(0, len(solved), len(asked))]
        texts.append(composite_text([(adapter, rows[place]) for place in asked], shown))
    return texts


def with_lists(singles: Encoded, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, adapter: int, lists: ListRows, end: int | None = None) -> Encoded:
    """The rows of a task, and lists of its questions (:func:`list_texts`): of all rows together, the share ``lists.share`` are lists.

    Args:
        singles: The task's train rows as tokens.
        rows: The same rows as text, in the same order.
        tokenizer: The base model's tokenizer.
        adapter: Gate label of the questions and the answers.
        lists: Share and size of the lists.
        end: Token id that closes a response; None is the end-of-sequence token.
    """
    count = lists.count(len(singles.rows))
    if count == 0:
        return singles
    made = encode_labelled(list_texts(rows, row_lengths(singles.rows), adapter, lists), tokenizer, lists.max_length, end)
    return Encoded(RowsWithLists(singles.rows, made.rows, count), singles.cut + made.cut)


class RowsWithLists(RowsOnDemand):
    """Rows of a task followed by lists of its questions, which are repeated if there are too few.

    Args:
        singles: The task's rows.
        lists: The lists, at least one.
        count: Number of lists to add.

    Attributes:
        lengths: Number of tokens of every row.
    """

    def __init__(self, singles: Sequence[TrainRow], lists: Sequence[TrainRow], count: int) -> None:
        self._singles, self._lists = singles, lists
        self.lengths: list[int] = [*row_lengths(singles), *(len(lists[index % len(lists)]) for index in range(count))]

    def row(self, index: int) -> TrainRow:
        singles = len(self._singles)
        return self._singles[index] if index < singles else self._lists[(index - singles) % len(self._lists)]
