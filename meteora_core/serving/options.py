"""The sampling options of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meteora_core.generation.sampling import Sampling


@dataclass(frozen=True)
class SamplingOptions(Sampling):
    """How the tokens of an answer are chosen, and when it ends. In addition to the attributes of :class:`meteora_core.generation.sampling.Sampling`:

    Attributes:
        stop: Texts that end the answer; they are not part of it.
        logprobs: Number of most likely tokens to report with log probabilities at each position; None reports none.
        logit_bias: Values that are added to the logits of tokens, by token id.
        presence_penalty: Value that is subtracted from the logits of tokens that the answer contains.
        frequency_penalty: Value that is subtracted from the logit of a token for each time that the answer contains it.
        grammar: Grammar of llguidance that the answer must match; None for any text.
        ignore_end: Whether end tokens do not end the answer.
    """

    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: str | None = None
    ignore_end: bool = False
