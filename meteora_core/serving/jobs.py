"""Requests in progress, and the events that they send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.routing import RoutingOptions
from meteora_core.serving.options import SamplingOptions

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenRoutes:
    """The adapters of one token.

    Attributes:
        mean: Weight of every adapter, averaged over the layers, float32 (N,) on the CPU.
        indices: Adapters of each layer, int64 (layers, k); None unless layers are requested one by one.
        weights: Their weights, float32 (layers, k); None likewise.
        paths: Module paths of the layers, in the order of ``indices``.
    """

    mean: Tensor
    indices: Tensor | None = None
    weights: Tensor | None = None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """Event: a token was generated.

    Attributes:
        id: Token id.
        text: Text that can be sent now; empty while a character or a possible stop text is incomplete.
        logprob: Log probability of the token; None if it is not requested.
        top: The most likely tokens at this position with their log probabilities.
        routes: Adapters of the position that generated the token; None if they are not requested.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    routes: TokenRoutes | None = None


@dataclass(frozen=True)
class Done:
    """Event: the answer is complete.

    Attributes:
        reason: Reason why the answer ended.
        text: Remaining text.
        prompt_tokens: Number of tokens in the prompt.
        cached_tokens: Number of prompt tokens that the prefix cache held.
        tokens: Number of generated tokens, including an end token.
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Failed:
    """Event: the answer failed.

    Attributes:
        error: The reason, for the client.
        server: Whether the server is at fault, rather than the request.
    """

    error: MeteoraError
    server: bool = True


JobEvent = Chosen | Done | Failed
Sink = Callable[[JobEvent], None]


@dataclass(eq=False)
class Job:
    """One answer to generate.

    Attributes:
        ids: Token ids of the prompt.
        sampling: How tokens are chosen.
        routing: How adapters are chosen.
        sink: Function that receives the events; the scheduler's thread calls it, so it must return at once.
        routes: Routes to report: none, averaged over the layers, or for each layer.
        created: Time of the request, by ``time.perf_counter``.
    """

    ids: Sequence[int]
    sampling: SamplingOptions
    routing: RoutingOptions
    sink: Sink
    routes: Literal["none", "mean", "layers"] = "none"
    created: float = field(default_factory=time.perf_counter)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop the answer before the next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()


@dataclass(frozen=True)
class StepReport:
    """What one step did, for metrics.

    Attributes:
        rows: Number of requests in the batch.
        read: Number of prompt tokens that were read.
        written: Number of tokens that were generated.
        seconds: Duration of the step.
        shares: Weight of every adapter, summed over the generated tokens, float32 (N,); None in a step that records no routes.
        names: Names of the adapters.
        first: Seconds from the request to the first token, for each answer that began.
        gaps: Seconds between two tokens of an answer, for each other token.
    """

    rows: int
    read: int
    written: int
    seconds: float
    shares: Tensor | None
    names: tuple[str, ...]
    first: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()


def cache_key(version: int, options: RoutingOptions) -> Hashable:
    """The key of a request in the prefix cache: the bank's version and the routing options, without those that have no effect."""
    if not options.enabled:
        return version, "base"
    if options.weights is not None:
        return version, "weights", *sorted(options.weights.items())
    if options.forced is not None:
        return version, "forced", options.forced
    return version, "gates", options.top_k, options.temperature, tuple(sorted(options.muted))


def check_prompt(ids: Sequence[int], longest: int, vocabulary: int) -> None:
    """Check the prompt of a request.

    Args:
        ids: Token ids of the prompt.
        longest: Maximum number of tokens in prompt and answer.
        vocabulary: Number of token ids that a prompt may contain.

    Raises:
        UsageError: The prompt is empty or too long, or has an unknown token id.
    """
    if not ids:
        raise UsageError("the prompt is empty", hint="write something first")
    if len(ids) >= longest:
        message = f"This model's maximum context length is {longest} tokens, and the prompt has {len(ids)}"
        raise UsageError(message, hint="shorten the prompt; the answer needs at least one token")
    if not all(0 <= token < vocabulary for token in ids):
        raise UsageError(f"the prompt has a token id outside 0..{vocabulary - 1}", hint="use the ids of this model's tokenizer, or send text")
