"""The assignment of rows to batches. It depends on the seed alone, so that a resumed run continues with the same batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BUCKET = 16
"""Number of batches whose rows are sorted by length together: this reduces padding and keeps the order random enough."""

Pick = tuple[int, int]
"""``(task, row)``."""


@dataclass(frozen=True)
class RowMix:
    """How often rows are drawn from the tasks.

    Attributes:
        extra: Token counts of the rows that belong to no single task (composites and joined rows).
        extra_share: Fraction of all drawn rows that belong to several tasks; in a plan their task number is the number of tasks.
        balanced: True draws the same number of tokens from every task; False draws every row equally often.
    """

    extra: Sequence[int] = ()
    extra_share: float = 0.0
    balanced: bool = True


BALANCED = RowMix()
"""The same number of tokens from every task, and no rows of several tasks."""


class _Picker:
    """Hands out rows one by one; see :func:`plan_batches`."""

    def __init__(self, lengths: Sequence[Sequence[int]], seed: int, mix: RowMix) -> None:
        self.rng = random.Random(seed)
        self.lengths = [*lengths, mix.extra] if mix.extra_share else list(lengths)
        self.streams = [_endless(len(rows), random.Random(self.rng.random())) for rows in self.lengths]
        self.whole = [1.0 if mix.balanced else len(rows) for rows in lengths]
        self.spent = [self.rng.random() / whole for whole in self.whole]
        self.balanced = mix.balanced
        self.share, self.owed = mix.extra_share, 0.0

    def next(self) -> Pick:
        self.owed += self.share
        if self.owed >= 1 - 1e-9:
            self.owed -= 1
            task = len(self.lengths) - 1
            return task, next(self.streams[task])
        task = self.spent.index(min(self.spent))
        row = next(self.streams[task])
        self.spent[task] += self.lengths[task][row] if self.balanced else 1 / self.whole[task]
        return task, row

    def length(self, pick: Pick) -> int:
        return self.lengths[pick[0]][pick[1]]


def plan_batches(lengths: Sequence[Sequence[int]], batches: int, batch_size: int, seed: int, mix: RowMix = BALANCED) -> list[list[Pick]]:
    """Plan ``batches`` batches with the tasks balanced by tokens and rows of similar length together.

    The rows of each task are drawn in a random order, and each of them once before any is drawn again. The next row always comes from the task with the
    fewest tokens so far: losses are means over tokens, so that every task has the same weight, independent of the number and length of its rows.
    If ``mix.balanced`` is False, the next row comes from the task of which the smallest fraction of rows has been drawn.

    Args:
        lengths: Per task, the token count of each of its rows.
        batches: Number of batches.
        batch_size: Rows in each batch.
        seed: Seed of every random choice.
        mix: Balance between the tasks, and the share of composites.

    Returns:
        Per batch, ``(task, row)`` pairs.

    Example:
        >>> plan_batches([[5], [5]], batches=1, batch_size=2, seed=0)
        [[(1, 0), (0, 0)]]
    """
    picker = _Picker(lengths, seed, mix)
    planned: list[list[Pick]] = []
    while len(planned) < batches:
        count = min(BUCKET, batches - len(planned))
        pool = [picker.next() for _ in range(count * batch_size)]
        pool.sort(key=picker.length)
        group = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        picker.rng.shuffle(group)
        planned += group
    return planned


def plan_packed(
    lengths: Sequence[Sequence[int]],
    batches: int,
    batch_size: int,
    capacity: int,
    seed: int,
    mix: RowMix = BALANCED,
) -> list[list[list[Pick]]]:
    """Plan batches of packed sequences: rows in the same balanced order, each put into the first sequence that has room for it.

    Args:
        lengths, batches, seed, mix: As for :func:`plan_batches`.
        batch_size: Number of sequences in each batch.
        capacity: Maximum number of tokens of a sequence; no row is longer.

    Returns:
        Per batch, per sequence, ``(task, row)`` pairs.
    """
    picker = _Picker(lengths, seed, mix)
    planned: list[list[list[Pick]]] = []
    waiting = picker.next()
    while len(planned) < batches:
        count = min(BUCKET, batches - len(planned)) * batch_size
        bins: list[list[Pick]] = [[] for _ in range(count)]
        room = [capacity] * count
        while (index := next((i for i, left in enumerate(room) if left >= picker.length(waiting)), None)) is not None:
            bins[index].append(waiting)
            room[index] -= picker.length(waiting)
            waiting = picker.next()
        picker.rng.shuffle(bins)
        planned += [bins[start : start + batch_size] for start in range(0, count, batch_size)]
    return planned


def _endless(count: int, rng: random.Random) -> Iterator[int]:
    order = list(range(count))
    while True:
        rng.shuffle(order)
        yield from order
