"""Requests to the engine, and the events of a streamed answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from meteora_core.generation.sampling import Sampling
from meteora_core.routing import Meteora, RoutingOptions

Finish = Literal["end", "length", "context", "stopped"]
"""Reason why an answer ended: an end token, max_new_tokens, a full context, or a stop by the caller."""


@dataclass(frozen=True)
class RoutingScope:
    """How adapters are chosen while a request is processed.

    Attributes:
        key: Everything besides the tokens that the keys and values of a cache depend on. Requests with equal keys can share a cache.
        enter: Function that returns the context manager of a forward pass, such as one that forces routes or disables adapters.
        options: The same choice as a value. Requests whose scopes have options can share a batch even if the options differ; None allows only equal keys.
    """

    key: Hashable = None
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: RoutingOptions | None = None

    @classmethod
    def of(cls, state: Meteora, options: RoutingOptions) -> RoutingScope:
        """The scope of a request that is routed by ``options``.

        Args:
            state: The routing state of the model.
            options: The options of the request.

        Raises:
            UsageError: The options do not fit the model's adapters.
        """
        options.check(state.names)
        return cls(options, lambda: state.apply(options), options)


@dataclass(frozen=True)
class Request:
    """One prompt to answer. The requests of a batch may differ in everything; scopes that differ must have routing options.

    Attributes:
        ids: Token ids of the whole prompt, including earlier turns; at least one.
        sampling: Settings that choose the tokens and limit their number.
        scope: Settings that choose the adapters.
        record: Whether to record routes, which is possible only for streamed answers.
        read_from: Position from which tokens are read again even if the cache holds them, so that their routes are recorded. With None, only tokens that
            are not in the cache are read.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    scope: RoutingScope = RoutingScope()
    record: bool = False
    read_from: int | None = None


@dataclass(frozen=True)
class Reading:
    """Event: a chunk of the prompt was read.

    Attributes:
        done: Number of tokens read so far, out of ``total``.
        total: Number of tokens to read, without those in the cache.
        reused: Number of tokens whose keys and values were in the cache.
        routes: (indices, weights) of the tokens in this chunk, each of shape (tokens, layers, k); None if routes are not recorded.
        paths: Module paths of the recorded layers, in the order of the routes.
    """

    done: int
    total: int
    reused: int
    routes: tuple[Tensor, Tensor] | None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """Event: one token of the answer was generated.

    Attributes:
        id: Token id.
        text: Text that the token completes; may be empty.
        routes: (indices, weights) of the forward pass that generated the token, each of shape (1, layers, k); None if routes are not recorded.
    """

    id: int
    text: str
    routes: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Finished:
    """Event: the answer is complete.

    Attributes:
        reason: Reason why the answer ended.
        text: Text of the whole answer.
        ids: Token ids of the answer, without the end token.
        prompt_tokens: Number of tokens in the prompt.
        reused: Number of prompt tokens whose keys and values were in the cache.
        first_seconds: Seconds from the call to the first token.
        seconds: Seconds from the call to the end of the answer.
        paths: Module paths of the recorded layers, in the order of the routes.
        counted: Number of tokens in the answer, if their ids are not known.
    """

    reason: Finish
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    reused: int
    first_seconds: float
    seconds: float
    paths: tuple[str, ...]
    counted: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens in the answer."""
        return len(self.ids) if self.counted is None else self.counted

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first token; 0 if the answer has no more than one."""
        seconds = self.seconds - self.first_seconds
        return (self.length - 1) / seconds if self.length > 1 and seconds > 0 else 0.0


Event = Reading | Written | Finished
