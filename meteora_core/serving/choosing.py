"""Chooses the tokens of a batch, each row with its own settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meteora_core.generation.sampling import Draw, Sampling, drawing
from meteora_core.serving.grammars import Matcher
from meteora_core.serving.options import SamplingOptions


@dataclass(frozen=True)
class Choice:
    """The token of one row.

    Attributes:
        token: Token id.
        logprob: Log probability of the token before penalties, biases and the sampling temperature; None if it is not requested.
        top: The most likely tokens with their log probabilities.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Chooser:
    """The state of one answer that its choices depend on.

    Attributes:
        options: Sampling settings.
        device: Device of the logits.
        matcher: Position in the grammar that the answer must match; None for any text.
    """

    options: SamplingOptions
    device: torch.device
    matcher: Matcher | None = None
    _counts: Counter[int] = field(default_factory=Counter)
    _draw: Draw | None = None

    def __post_init__(self) -> None:
        options = self.options
        if options.temperature > 0:
            self._draw = drawing(Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed), self.device)

    @property
    def plain(self) -> bool:
        """Whether the choice is the most likely token and nothing else is reported."""
        options = self.options
        penalised = options.presence_penalty or options.frequency_penalty
        return self._draw is None and self.matcher is None and options.logprobs is None and not options.logit_bias and not penalised

    def choose(self, logits: Tensor) -> Choice:
        """Choose a token by its logits, float32 (vocabulary,)."""
        scores = self._adjusted(logits)
        token = int(scores.argmax()) if self._draw is None else self._draw(scores)
        if self.options.logprobs is None:
            return Choice(token)
        logprobs = torch.log_softmax(logits, -1)
        best = torch.topk(logprobs, min(self.options.logprobs, len(logprobs))) if self.options.logprobs else None
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
        return Choice(token, float(logprobs[token]), top)

    def _adjusted(self, logits: Tensor) -> Tensor:
        options = self.options
        bias = dict(options.logit_bias)
        if options.presence_penalty or options.frequency_penalty:
            for token, count in self._counts.items():
                bias[token] = bias.get(token, 0.0) - options.presence_penalty - options.frequency_penalty * count
        if bias:
            at = torch.tensor(list(bias), device=logits.device)
            logits = logits.index_add(0, at, torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype))
        return logits if self.matcher is None else self.matcher.allow(logits)

    def accept(self, token: int) -> bool:
        """Record that a token was generated. Returns whether the answer's grammar is complete."""
        if self.options.presence_penalty or self.options.frequency_penalty:
            self._counts[token] += 1
        return self.matcher is not None and self.matcher.accept(token)


def choose_all(logits: Tensor, choosers: list[Chooser]) -> list[Choice]:
    """Choose a token for each row of ``logits``, float32 (rows, vocabulary)."""
    best = logits.argmax(-1).tolist() if any(chooser.plain for chooser in choosers) else []
    return [Choice(best[row]) if chooser.plain else chooser.choose(logits[row]) for row, chooser in enumerate(choosers)]


class StopText:
    """Finds the first of several texts in an answer that arrives in parts, and holds back what may be the beginning of one.

    Args:
        stops: The texts.

    Attributes:
        found: Whether one of them has occurred.

    Example:
        >>> stop = StopText(("END",))
        >>> stop.add("one E"), stop.add("NDtwo"), stop.found
        ('one ', '', True)
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Add text. Returns what can be sent now."""
        if not self._stops:
            return text
        if self.found:
            return ""
        self._held += text
        first = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.found = True
            ready, self._held = self._held[:first], ""
            return ready
        kept = max((size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])), default=0)
        ready = self._held[: len(self._held) - kept]
        self._held = self._held[len(ready) :]
        return ready

    def flush(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
