"""Choice of an answer's tokens: greedy, or drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Draw = Callable[[Tensor], int]
"""A function that draws a token from the scores of one row, float32 (vocabulary,)."""


COLDEST = 1e-6
"""Sampling temperature below which the most likely token is as good as certain; logits divided by much smaller values would not be finite."""


@dataclass(frozen=True)
class Sampling:
    """Settings that choose the tokens of an answer and limit their number.

    Attributes:
        max_new_tokens: Maximum number of tokens in the answer.
        temperature: Sampling temperature; 0 always takes the most likely token.
        top_p: Probability mass of the smallest set of most likely tokens that are drawn from.
        seed: Seed of the random generator; the same seed gives the same answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def drawing(sampling: Sampling, device: torch.device) -> Draw:
    """Make the function that draws the tokens of one answer. It has a random generator that no other answer uses.

    Args:
        sampling: Settings with a sampling temperature above 0.
        device: Device of the scores.

    Returns:
        A function that draws one token per call.
    """
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(max(float(sampling.temperature), COLDEST))]
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def draw(scores: Tensor) -> int:
        scores = scores[None]
        for warper in warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator))

    return draw
