"""Chooses the tokens of a batch, each row with its own settings."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meteora_core.serving.grammars import Matcher
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.transfers import to_device


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
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.options.seed)

    @property
    def free(self) -> bool:
        """Whether a choice depends on the logits alone, and nothing else is reported; then rows are chosen together, on the device."""
        options = self.options
        penalised = options.presence_penalty or options.frequency_penalty
        return self.matcher is None and options.logprobs is None and not options.logit_bias and not penalised

    def number(self) -> float:
        """The random number of the next choice, 0 <= number < 1; it depends on the seed and on the number of choices before."""
        return self._random.random()

    def choose(self, logits: Tensor) -> Choice:
        """Choose a token by its logits, float32 (vocabulary,)."""
        scores = self._adjusted(logits)
        token = int(scores.argmax()) if self.options.greedy else int(draw(scores[None], [self]))
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


def draw(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Draw a token for each row by its sampling temperature and top-p; a row's token does not depend on other rows.

    Each row's next random number picks the token from the cumulative distribution, so a seed gives the same tokens in any batch.

    Args:
        logits: Logits float32 (rows, vocabulary).
        choosers: The choosers of the rows, none of them greedy, and either all or none with top-p below 1.

    Returns:
        Token ids int64 (rows,), on the device of ``logits``; the host does not wait for them.
    """
    options = [chooser.options for chooser in choosers]
    settings = [[each.temperature, each.top_p, chooser.number()] for each, chooser in zip(options, choosers, strict=True)]
    temperature, top_p, number = to_device(torch.tensor(settings, dtype=torch.float64), logits.device).unsqueeze(-1).unbind(1)
    weights = torch.softmax(logits / temperature.to(logits.dtype), -1)
    order = None
    if options[0].top_p < 1:
        weights, order = torch.sort(weights, dim=-1, descending=True, stable=True)
        before = weights.cumsum(-1, dtype=torch.float64) - weights
        weights = weights.masked_fill((before >= top_p) & (before > 0), 0.0)
    total = weights.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(total, total[:, -1:] * number, right=True).clamp_(max=logits.shape[-1] - 1)
    return (found if order is None else order.gather(-1, found)).squeeze(-1)


def choose_free(logits: Tensor, best: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """The tokens of rows whose choosers are all free, or that are ignored.

    Args:
        logits: Logits float32 (rows, vocabulary).
        best: Most likely token of each row, int64 (rows,); it may have more rows than there are choosers, which are left as they are.
        choosers: The choosers of the rows.

    Returns:
        ``best``, with drawn tokens in rows that are not greedy.
    """
    for cut in (False, True):
        drawn = [row for row, each in enumerate(choosers) if each.free and not each.options.greedy and (each.options.top_p < 1) == cut]
        if drawn:
            at = to_device(torch.tensor(drawn), best.device)
            best[at] = draw(logits[at], [choosers[row] for row in drawn])
    return best


def choose_all(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """Choose a token for each row of ``logits``, float32 (rows, vocabulary)."""
    free = choose_free(logits, logits.argmax(-1), choosers).tolist() if any(chooser.free for chooser in choosers) else []
    return [Choice(free[row]) if chooser.free else chooser.choose(logits[row]) for row, chooser in enumerate(choosers)]


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
