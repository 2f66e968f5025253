"""A mode in which a token's result does not depend on the other tokens of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from meteora_kernels.plan.choose import table_of, use
from meteora_kernels.plan.table import Row, Table
from meteora_kernels.tile import Tile

INVARIANT = Row("packed", way="invariant", pieces=1, tile=Tile(tokens=64, outputs=128, step=64, warps=4, stages=3), inline=True, measured="not measured")
"""The row that every fused group takes in this mode, whatever the number of tokens."""


@contextmanager
def batch_invariance(device: torch.device | str) -> Iterator[None]:
    """Within the block, a token's output of a fused group has the same bits in every batch, at every place in it.

    Usually the path, its tiles and the library's choice of a kernel depend on the number of tokens, and sums of other orders differ by rounding. In this
    mode, all fused groups take one path with one tile, so each output is computed by the same sums. Layers outside of fused groups, attention and the
    output layer are not changed. CUDA graphs keep the path that they were captured with.

    Args:
        device: The device of the groups. The mode holds for all threads.

    Example:
        >>> from meteora_kernels import batch_invariance
        >>> with batch_invariance("cuda"):  # doctest: +SKIP
        ...     alone, together = run_group(x[:1], group, Routing()), run_group(x, group, Routing())
        >>> torch.equal(alone[0], together[0])  # doctest: +SKIP
        True
    """
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    before = table_of(place)
    use(place, Table("batch invariance", (INVARIANT,), before.layer))
    try:
        yield
    finally:
        use(place, before)
