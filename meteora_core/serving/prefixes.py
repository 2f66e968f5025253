"""The prefix cache: keys and values of texts that earlier requests have read, in blocks that all requests share.

The choice of adapters is a function of the tokens before it, so one cache serves all adapters of a bank. Its keys contain what else the values depend on: the
version of the bank and the routing options of the request.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch

from meteora_core.serving.slots import Columns, Slots, joined, nbytes

BLOCK = 32
"""Number of tokens in a block."""


class PrefixCache:
    """Blocks of keys and values, by a digest of the routing options and all tokens up to the end of the block. The least recently used ones are dropped.

    Args:
        budget: Maximum number of bytes; 0 stores nothing.

    Attributes:
        bytes: Number of bytes in use.
        hits: Number of tokens that were taken from the cache.
        queries: Number of tokens that were looked up.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = self.hits = self.queries = 0
        self._blocks: OrderedDict[bytes, Columns] = OrderedDict()
        self._sizes: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, key: Hashable, tokens: Sequence[int], slots: Slots, slot: int) -> int:
        """Copy the longest known prefix of ``tokens`` to a slot. Returns its number of tokens, always less than ``len(tokens)``."""
        self.queries += len(tokens)
        blocks: list[Columns] = []
        for digest in digests(key, tokens[: len(tokens) - 1]):
            block = self._blocks.get(digest)
            if block is None:
                break
            self._blocks.move_to_end(digest)
            blocks.append(block)
        if not blocks or not slots.ready:
            return 0
        length = len(blocks) * BLOCK
        slots.reserve(length)
        slots.write(slot, 0, joined(blocks))
        self.hits += length
        return length

    def store(self, key: Hashable, tokens: Sequence[int], slots: Slots, slot: int) -> None:
        """Keep the complete blocks of a slot's first ``len(tokens)`` columns that are not in the cache yet."""
        if not self.budget or not slots.ready:
            return
        names = digests(key, tokens)
        known = 0
        while known < len(names) and names[known] in self._blocks:
            self._blocks.move_to_end(names[known])
            known += 1
        if known == len(names):
            return
        layers = slots.read(slot, known * BLOCK, len(names) * BLOCK)
        new = nbytes(layers)
        if new > self.budget:
            return
        self._make_room(new)
        for index, digest in enumerate(names[known:]):
            block = [stack[:, :, index * BLOCK : (index + 1) * BLOCK].clone() for stack in layers]
            if digest not in self._blocks:
                self._blocks[digest], self._sizes[digest] = block, nbytes(block)
                self.bytes += self._sizes[digest]

    def _make_room(self, needed: int) -> None:
        while self._blocks and self.bytes + needed > self.budget:
            digest, _ = self._blocks.popitem(last=False)
            self.bytes -= self._sizes.pop(digest)

    def clear(self) -> None:
        """Drop all blocks."""
        self._blocks.clear()
        self._sizes.clear()
        self.bytes = 0


def digests(key: Hashable, tokens: Sequence[int]) -> list[bytes]:
    """A digest for each complete block of ``tokens``, of ``key`` and all tokens up to the end of the block."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=24).digest()
    found = []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        block = torch.tensor(list(tokens[end - BLOCK : end]), dtype=torch.int64).numpy().tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=24).digest()
        found.append(digest)
    return found
