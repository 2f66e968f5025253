"""Random sizes of layers: 1 to 8,192 tokens, 1 to 1,024 adapters, ranks 1 to 128, uniform and mixed, top-1 to top-8."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

MOST_RANK = 32768
"""The largest sum of ranks, so that the weights of a case fit into memory beside others."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer and one call.

    Attributes:
        tokens: Number of tokens M.
        ranks: Rank of every adapter.
        top_k: Number of adapters per token k.
        hidden: Width of the input h.
        width: Number of outputs o.
    """

    tokens: int
    ranks: tuple[int, ...]
    top_k: int
    hidden: int
    width: int

    @property
    def name(self) -> str:
        ranks = f"{self.ranks[0]}" if len(set(self.ranks)) == 1 else f"{min(self.ranks)}-{max(self.ranks)}"
        return f"{self.tokens}t-{len(self.ranks)}x{ranks}-top{self.top_k}-{self.hidden}to{self.width}"


def draw(count: int, seed: int = 0) -> list[Sizes]:
    """``count`` sizes, logarithmically uniform."""
    chance = random.Random(seed)

    def size(least: int, most: int) -> int:
        return min(most, round(math.exp(chance.uniform(math.log(least), math.log(most + 0.5)))))

    found = []
    while len(found) < count:
        adapters, most = size(1, 1024), size(1, 128)
        mixed = chance.random() < 0.5
        ranks = tuple(size(1, most) if mixed else most for _ in range(adapters))
        tokens, top_k = size(1, 8192), min(adapters, size(1, 8))
        hidden, width = chance.choice(((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (576, 1536)))
        if sum(ranks) <= MOST_RANK and sum(ranks) * tokens <= 1 << 27:
            found.append(Sizes(tokens, ranks, top_k, hidden, width))
    return found
