"""Greedy answers to many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from meteora_core.generation.engine import Engine
from meteora_core.generation.prompts import Prompt
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling

AUTO_ROWS = 256
"""Maximum number of prompts in an automatic batch."""


@dataclass(frozen=True)
class BatchLimits:
    """Limits on the size of batches and the length of answers.

    Attributes:
        batch_size: Number of rows per batch, or "auto" to choose it from the memory available.
        max_new_tokens: Maximum number of new tokens per row.
        max_total_tokens: Maximum number of tokens in prompt and answer together, per row; with None only the model's context limits it.
    """

    batch_size: int | Literal["auto"]
    max_new_tokens: int
    max_total_tokens: int | None = None

    def request(self, prompt: Prompt) -> Request:
        """Return the request for a greedy answer to ``prompt``. It allows at least one new token."""
        max_new_tokens = self.max_new_tokens
        if self.max_total_tokens is not None:
            max_new_tokens = min(max_new_tokens, max(1, self.max_total_tokens - len(prompt.tokens)))
        return Request(prompt.tokens, Sampling(max_new_tokens=max_new_tokens))


def auto_budget(device: torch.device) -> int:
    """Maximum number of tokens (prompts, answers and padding) in an automatic batch.

    On a GPU it grows with the memory that this process has not allocated; on a CPU it is a small constant. Memory held by other processes is ignored,
    so that a run does not depend on them. If memory runs out, :func:`answer_all` halves the batches.
    """
    if device.type == "cuda":
        free_bytes = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
        return max(8_192, min(262_144, int(free_bytes / 2**30) * 4_096))
    return 8_192


def plan(prompts: Sequence[Prompt], batch_size: int | Literal["auto"], max_new_tokens: int, budget: int) -> list[list[Prompt]]:
    """Group prompts of similar length into batches.

    The batch with the longest prompts comes first, so that a lack of memory shows at the start of a run.

    Args:
        prompts: Prompts in any order.
        batch_size: Number of rows per batch, or "auto" for the largest power of two that fits ``budget``.
        max_new_tokens: Maximum number of new tokens per row.
        budget: Maximum number of tokens in an automatic batch.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.index))
    batches: list[list[Prompt]] = []
    while ordered:
        size = batch_size if batch_size != "auto" else _power_of_two(min(AUTO_ROWS, max(1, budget // (len(ordered[0].tokens) + max_new_tokens))))
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


def _power_of_two(size: int) -> int:
    """The largest power of two up to ``size``. With only a few batch sizes, batches share the decoder's caches and CUDA graphs."""
    return 1 << (size.bit_length() - 1)


def answer_all(
    engine: Engine, prompts: Sequence[Prompt], limits: BatchLimits, on_smaller: Callable[[int], None] | None = None
) -> Iterator[tuple[Prompt, list[int]]]:
    """Answer prompts greedily, batch by batch. A batch that does not fit into GPU memory is halved, down to a single row.

    Args:
        engine: The engine that runs the model.
        prompts: Prompts in any order, none of them empty.
        limits: Limits on the size of batches and the length of answers.
        on_smaller: Function called with the new batch size whenever a batch did not fit.

    Yields:
        Each prompt and its new tokens, without the end token, as soon as its batch is finished.

    Raises:
        NonFiniteError: The model's logits are NaN or infinite.
        torch.OutOfMemoryError: A single row does not fit into memory.
    """
    waiting = plan(prompts, limits.batch_size, limits.max_new_tokens, auto_budget(engine.device))
    while waiting:
        batch = waiting.pop(0)
        try:
            answers = engine.answer([limits.request(prompt) for prompt in batch])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            engine.release()
            torch.cuda.empty_cache()
            size = len(batch) // 2
            if on_smaller is not None:
                on_smaller(size)
            rest = [prompt for group in [batch, *waiting] for prompt in group]
            waiting = [rest[start : start + size] for start in range(0, len(rest), size)]
            continue
        yield from zip(batch, answers, strict=True)
