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
"""Most prompts in one automatic batch."""


@dataclass(frozen=True)
class BatchLimits:
    """How large batches and answers may become.

    Attributes:
        batch_size: Rows of each batch, or "auto".
        max_new_tokens: Most new tokens of a row.
        max_total_tokens: Most tokens of prompt and answer together, of each row by itself; None sets no limit besides the model's context.
    """

    batch_size: int | Literal["auto"]
    max_new_tokens: int
    max_total_tokens: int | None = None

    def request(self, prompt: Prompt) -> Request:
        """The request for a greedy answer to a prompt; at least one token is allowed."""
        room = self.max_new_tokens
        if self.max_total_tokens is not None:
            room = min(room, max(1, self.max_total_tokens - len(prompt.tokens)))
        return Request(prompt.tokens, Sampling(max_new_tokens=room))


def auto_budget(device: torch.device) -> int:
    """Most tokens (prompts and answers, padding included) in an automatic batch: by the GPU memory that this process does not hold yet, few on a CPU.

    What other processes hold does not count, so that a run does not depend on them; where memory runs out, batches are halved.
    """
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
        return max(8_192, min(262_144, int(room / 2**30) * 4_096))
    return 8_192


def plan(prompts: Sequence[Prompt], batch_size: int | Literal["auto"], max_new_tokens: int, budget: int) -> list[list[Prompt]]:
    """Batches of prompts of similar length, the longest first, so that memory runs out at once if it does at all.

    Args:
        prompts: Prompts in any order.
        batch_size: Rows of each batch, or "auto": the greatest power of two that fits ``budget``.
        max_new_tokens: Most new tokens of a row.
        budget: Most tokens in an automatic batch.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.index))
    batches: list[list[Prompt]] = []
    while ordered:
        size = batch_size if batch_size != "auto" else _power_of_two(min(AUTO_ROWS, max(1, budget // (len(ordered[0].tokens) + max_new_tokens))))
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


def _power_of_two(size: int) -> int:
    """The greatest power of two that is not above ``size``: batches of few sizes share what the decoder keeps."""
    return 1 << (size.bit_length() - 1)


def answer_all(
    engine: Engine, prompts: Sequence[Prompt], limits: BatchLimits, on_smaller: Callable[[int], None] | None = None
) -> Iterator[tuple[Prompt, list[int]]]:
    """Answer prompts greedily, batch by batch. A batch that does not fit the GPU's memory is halved, down to one row.

    Args:
        engine: The engine of the model.
        prompts: Prompts in any order; none is empty.
        limits: Sizes of batches and answers.
        on_smaller: Called with the new size when a batch did not fit.

    Yields:
        Each prompt with its new tokens, up to (without) the end token, as batches finish.

    Raises:
        NonFiniteError: The model's logits are NaN or infinite.
        torch.OutOfMemoryError: Even one row does not fit.
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
