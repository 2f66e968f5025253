"""Which rows make which batch: fixed by the seed alone, so that a resumed run goes on with the very batches that were left."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

BUCKET = 16
"""Batches whose rows are sorted by length together; less padding, and still random enough."""

Pick = tuple[int, int]
"""``(task, row)``."""


class _Picker:
    """Hands out rows one by one; see :func:`plan_batches`."""

    def __init__(self, lengths: Sequence[Sequence[int]], seed: int, extra: Sequence[int], extra_share: float, balanced: bool) -> None:
        self.rng = random.Random(seed)
        self.lengths = [*lengths, extra] if extra_share else list(lengths)
        self.streams = [_endless(len(rows), random.Random(self.rng.random())) for rows in self.lengths]
        self.whole = [1.0 if balanced else len(rows) for rows in lengths]
        self.spent = [self.rng.random() / whole for whole in self.whole]
        self.balanced = balanced
        self.share, self.owed = extra_share, 0.0

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


def plan_batches(
    lengths: Sequence[Sequence[int]], batches: int, batch_size: int, seed: int, *, extra: Sequence[int] = (), extra_share: float = 0.0, balanced: bool = True
) -> list[list[Pick]]:
    """Lay out ``batches`` batches, tasks balanced by tokens, rows of like length together.

    Every task's rows come in a random order, all of them once before any comes again. The next row is always of the task that has had the
    fewest tokens so far: losses are means over tokens, so each task weighs the same whatever its rows' number and length.

    Args:
        lengths: Per task, the token count of each of its rows.
        batches: How many.
        batch_size: Rows in each.
        seed: Fixes everything.
        extra: Token counts of rows that belong to no single task (composites).
        extra_share: This share of all rows are extra ones; in the plan their task number is ``len(lengths)``.
        balanced: False draws every row as often as any other instead: the next row is of the task that is least far through its rows.

    Returns:
        Per batch, ``(task, row)`` pairs.
    """
    picker = _Picker(lengths, seed, extra, extra_share, balanced)
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
    *,
    extra: Sequence[int] = (),
    extra_share: float = 0.0,
    balanced: bool = True,
) -> list[list[list[Pick]]]:
    """Lay out batches of packed sequences: rows in the same balanced order, each put into the first sequence that has room for it.

    Args:
        lengths, batches, seed, extra, extra_share, balanced: As for :func:`plan_batches`.
        batch_size: Sequences in each batch.
        capacity: Tokens that a sequence holds; no row is longer.

    Returns:
        Per batch, per sequence, ``(task, row)`` pairs.
    """
    picker = _Picker(lengths, seed, extra, extra_share, balanced)
    planned: list[list[list[Pick]]] = []
    waiting = picker.next()
    while len(planned) < batches:
        count = min(BUCKET, batches - len(planned)) * batch_size
        bins: list[list[Pick]] = [[] for _ in range(count)]
        room = [capacity] * count
        while (place := next((i for i, left in enumerate(room) if left >= picker.length(waiting)), None)) is not None:
            bins[place].append(waiting)
            room[place] -= picker.length(waiting)
            waiting = picker.next()
        picker.rng.shuffle(bins)
        planned += [bins[start : start + batch_size] for start in range(0, count, batch_size)]
    return planned


def _endless(count: int, rng: random.Random) -> Iterator[int]:
    order = list(range(count))
    while True:
        rng.shuffle(order)
        yield from order
