"""How the tokens of one answer are chosen: greedily, or drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Draw = Callable[[Tensor], int]
"""Takes the scores of one row, float32 (vocabulary,), and returns the token that was drawn."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, and how many there may be.

    Attributes:
        max_new_tokens: Most tokens in the answer.
        temperature: Sampling temperature; 0 takes the likeliest token.
        top_p: Tokens are drawn from the smallest set whose probabilities reach this sum.
        seed: Seed of the draws; the same seed gives the same answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def drawing(sampling: Sampling, device: torch.device) -> Draw:
    """The draws of one answer, with a random generator of their own.

    Args:
        sampling: Settings whose temperature is above 0.
        device: Device of the scores.

    Returns:
        A function that draws one token at each call.
    """
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def draw(scores: Tensor) -> int:
        scores = scores[None]
        for step in steps:
            scores = step(None, scores)
        return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator))

    return draw
