"""Keys and values of one conversation in a cache of fixed size, so that writing a token can be the replay of a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

LEAST = 512
"""Tokens in the smallest cache; a larger one has twice as many, and so on."""


class FixedCache:
    """What a model has read, and a step of one token over it; on a CUDA GPU the step is a graph.

    Args:
        model: A causal LM in evaluation mode that :func:`meteora_core.generation.batched.can_be_fixed`.
        arguments: More keyword arguments of its forward.
        longest: The model's context, which bounds the cache; None when it has none.

    Attributes:
        length: How many tokens were read.
    """

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any], longest: int | None) -> None:
        self.model, self.arguments, self.longest = model, arguments, longest
        self.length = 0
        self.capacity = 0
        self._cache: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: Hashable = None
        self._capturable = model.device.type == "cuda"

    @property
    def captured(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._graph is not None

    @torch.inference_mode()
    def cut(self, length: int) -> None:
        """Forget all tokens from ``length`` on; also what a pass that was broken off has left."""
        if self.capacity:
            self._go_to(length)
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(length)

    def _go_to(self, length: int) -> None:
        self.length = length
        self._slot.fill_(length)
        self._mask.copy_(self._places < length)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], key: Hashable = None) -> Tensor:
        """Read on.

        Args:
            tokens: One or more.
            key: What a graph depends on beside the weights (how adapters are chosen); None runs without a graph.

        Returns:
            The last position's logits, float32 (vocabulary,); only valid until the next call.
        """
        if self.length + len(tokens) > self.capacity:
            self._grow(self.length + len(tokens))
        if len(tokens) == 1:
            self._token.fill_(tokens[0])
            logits = self._step(key)
            self.length += 1
        else:
            ends = self.length + torch.arange(len(tokens), device=self._slot.device)
            mask = (self._places <= ends.view(-1, 1)).view(1, 1, len(tokens), -1)
            logits = self._forward(torch.tensor([list(tokens)], device=self._slot.device), mask, ends.unsqueeze(0))
            self._go_to(self.length + len(tokens))
        return logits

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True, **self.arguments)
        return output.logits[0, -1].float()

    def _one(self) -> Tensor:
        """Read :attr:`_token`."""
        self._mask.index_fill_(3, self._slot, True)
        logits = self._forward(self._token, self._mask, self._slot.view(1, 1))
        self._slot.add_(1)
        return logits

    def _step(self, key: Hashable) -> Tensor:
        if key is None or not self._capturable:
            return self._one()
        if self._graph is None or self._key != key:
            self._graph = None
            try:
                with torch.cuda.device(self.model.device):
                    self._capture()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._capturable = False
                _log.warning("this model's steps cannot be captured in a CUDA graph, it is run without: %s", str(error).splitlines()[0])
                self.cut(self.length)
                return self._one()
            self._key = key
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once, so that kernels are loaded and workspaces made
            self._one()
            self.cut(self.length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._one()
        self._graph = graph

    def _grow(self, needed: int) -> None:
        """Move to a larger cache."""
        from transformers import StaticCache

        capacity = max(LEAST, 1 << (needed - 1).bit_length())
        if self.longest is not None:
            capacity = max(needed, min(capacity, self.longest))
        device, before = self.model.device, self._cache.layers if self._cache is not None else []
        cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        for mine, theirs in zip(cache.layers, before, strict=False):
            if not theirs.is_initialized:
                continue
            mine.lazy_initialization(theirs.keys, theirs.values)
            mine.keys[:, :, : self.length].copy_(theirs.keys[:, :, : self.length])
            mine.values[:, :, : self.length].copy_(theirs.values[:, :, : self.length])
        self._cache, self.capacity, self._graph = cache, capacity, None
        self._places = torch.arange(capacity, device=device)
        self._mask = torch.zeros(1, 1, 1, capacity, dtype=torch.bool, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.cut(self.length)
