"""Reading further tokens of a single row by CUDA graphs, one for each of a few lengths.

Up to several hundred tokens, launching the kernels of a forward pass one by one takes longer than running them. A graph has fixed shapes, so the tokens
are padded on the right to the next length in :data:`LENGTHS`. Keys and values of the padding are masked, and the next tokens overwrite them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meteora_core.generation.capture import CapturedStep, capture

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
"""The numbers of tokens that graphs read."""


class PieceCache(Protocol):
    """A cache of fixed size for one row, as :class:`meteora_core.generation.fixed_cache.FixedCache`.

    Attributes:
        length: Number of tokens in the cache.
    """

    length: int

    def cut(self, length: int) -> int:
        """Forget all tokens from position ``length`` on."""

    def read_padded(self, ids: Tensor, mask: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Read tokens with padding on the right.

        Args:
            ids: The tokens, int64 (1, n).
            mask: The columns that each of them attends to, bool (1, 1, n, capacity).
            positions: Their positions, int64 (1, n).
            last: Index of the last token that is not padding, int64 (1,).

        Returns:
            The logits of that token, (1, vocabulary).
        """


@dataclass(frozen=True)
class PieceGraph:
    """The graph for one length.

    Attributes:
        given: The graph's input, int64 (length + 2,): the padded tokens, the number of tokens in the cache, and the number of tokens without padding.
        step: The captured forward pass.
    """

    given: Tensor
    step: CapturedStep


class PieceGraphs:
    """Graphs that read further tokens of a single row into a cache of fixed size.

    A length is captured when it is needed for the second time, because capturing takes as long as two forward passes.

    Args:
        columns: Numbers of the cache's columns, int64 (capacity,), on the CUDA device that the graphs run on.

    Attributes:
        can_capture: Whether lengths are still captured: true until a capture fails.
    """

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        self._needed: set[int] = set()
        self._graphs: dict[int, PieceGraph] = {}
        self._key: Hashable = None
        self._pool: Any = None
        self.can_capture = True

    def read(self, cache: PieceCache, tokens: Sequence[int], key: Hashable) -> Tensor | None:
        """Read tokens by a graph.

        Args:
            cache: The cache to read into, always the same.
            tokens: The tokens to read.
            key: Everything besides the weights that a graph depends on; graphs for another key are deleted.

        Returns:
            The logits of the last token (1, vocabulary), a new tensor; None if the tokens must be read without a graph.
        """
        if key != self._key:
            # A pool whose graphs are all deleted is gone, and capturing into it would fail.
            self._graphs, self._key, self._pool = {}, key, None
        length = cache.length
        size = next((size for size in LENGTHS if size >= len(tokens)), None)
        if size is None or length + size > len(self._columns):
            return None
        row = torch.tensor([*tokens, *[tokens[-1]] * (size - len(tokens)), length, len(tokens)])
        graph = self._graphs.get(size) or self._capture(cache, size, row)
        if graph is None:
            return None
        graph.given.copy_(row)
        logits = graph.step.replay().clone()
        cache.cut(length + len(tokens))
        return logits

    def _capture(self, cache: PieceCache, size: int, row: Tensor) -> PieceGraph | None:
        if size not in self._needed:
            self._needed.add(size)
            return None
        if not self.can_capture:
            return None
        length, device = cache.length, self._columns.device
        given = row.to(device)
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

        def read() -> Tensor:
            # Whatever the graph reads is created in it, or outlives it: ``given``, the columns, the cache and the model.
            begin, last = given[size : size + 1], given[size + 1 :] - 1
            # Padding has the last token's position, so positions stay within the model's context.
            positions = begin + torch.minimum(torch.arange(size, device=device), last)
            mask = (self._columns <= positions.view(-1, 1)).view(1, 1, size, -1)
            return cache.read_padded(given[:size].unsqueeze(0), mask, positions.unsqueeze(0), last)

        step = capture(read, lambda: cache.cut(length), device, pool=self._pool)
        if step is None:
            self.can_capture = False
            return None
        graph = self._graphs[size] = PieceGraph(given, step)
        return graph
