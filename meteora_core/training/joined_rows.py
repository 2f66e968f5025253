"""Training rows that consist of several complete rows of different tasks, one after another (``--joined-rows``).

In such a sequence the adapter changes in the middle of the context, as it does from one answer of a composite to the next, although every prompt and every
answer is that of a single task. This extends the paper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from meteora_core.errors import UsageError
from meteora_core.training.encoding import TrainRow, join_rows, row_lengths

TRIES = 8
"""Number of draws of tasks and rows of which at least two must fit into one sequence."""


def make_joined(rows: Sequence[Sequence[TrainRow]], *, count: int, largest: int, max_length: int, seed: int) -> list[TrainRow]:
    """Join complete rows of 2 to ``largest`` different tasks into sequences, without a mask between them: each row sees those before it.

    Tasks, their order and rows are drawn at random. A drawn row that no longer fits is left out; if fewer than two are left, all are drawn again, and after
    :data:`TRIES` draws the sequence has a single row.

    Args:
        rows: Per adapter, its train rows.
        count: Number of sequences.
        largest: Maximum number of rows in a sequence, at least 2; it is limited to the number of adapters.
        max_length: Maximum length of a sequence in tokens.
        seed: Seed of every random choice.

    Raises:
        UsageError: There are fewer than two adapters.

    Example:
        >>> one, other = TrainRow((1, 2), (0, 0), 1), TrainRow((3, 4), (1, 1), 1)
        >>> [row] = make_joined([[one], [other]], count=1, largest=2, max_length=8, seed=0)
        >>> len(row), sorted(row.gate_labels)
        (4, [0, 0, 1, 1])
    """
    if len(rows) < 2:
        raise UsageError("joined rows need at least two adapters", hint="leave out --joined-rows, or train more adapters")
    rng, lengths = random.Random(f"joined rows {seed}"), [row_lengths(task_rows) for task_rows in rows]
    return [join_rows([rows[task][place] for task, place in _draw(lengths, rng, min(largest, len(rows)), max_length)]) for _ in range(count)]


def _draw(lengths: Sequence[Sequence[int]], rng: random.Random, largest: int, max_length: int) -> list[tuple[int, int]]:
    """The tasks and indices of the rows of one sequence."""
    kept: list[tuple[int, int]] = []
    for _ in range(TRIES):
        kept, room = [], max_length
        for task in rng.sample(range(len(lengths)), rng.randint(2, largest)):
            place = rng.randrange(len(lengths[task]))
            if lengths[task][place] <= room:
                kept.append((task, place))
                room -= lengths[task][place]
        if len(kept) > 1:
            break
    return kept
