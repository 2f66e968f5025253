"""Which rows make which batch: fixed by the seed alone, so that a resumed run goes on with the very batches that were left."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

BUCKET = 16
"""Batches whose rows are sorted by length together; less padding, and still random enough."""


def plan_batches(lengths: Sequence[Sequence[int]], batches: int, batch_size: int, seed: int) -> list[list[tuple[int, int]]]:
    """Lay out ``batches`` batches, tasks balanced by tokens, rows of like length together.

    Every task's rows come in a random order, all of them once before any comes again. The next row is always of the task that has had the
    fewest tokens so far: losses are means over tokens, so each task weighs the same whatever its rows' number and length.

    Args:
        lengths: Per task, the token count of each of its rows.
        batches: How many.
        batch_size: Rows in each.
        seed: Fixes everything.

    Returns:
        Per batch, ``(task, row)`` pairs.
    """
    rng = random.Random(seed)
    streams = [_endless(len(rows), random.Random(rng.random())) for rows in lengths]
    spent = [rng.random() for _ in lengths]
    planned: list[list[tuple[int, int]]] = []
    while len(planned) < batches:
        count = min(BUCKET, batches - len(planned))
        pool = []
        for _ in range(count * batch_size):
            task = spent.index(min(spent))
            row = next(streams[task])
            spent[task] += lengths[task][row]
            pool.append((task, row))
        pool.sort(key=lambda pick: lengths[pick[0]][pick[1]])
        group = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(group)
        planned += group
    return planned


def _endless(count: int, rng: random.Random) -> Iterator[int]:
    order = list(range(count))
    while True:
        rng.shuffle(order)
        yield from order
