"""What the engine is asked for, and the events of an answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from meteora_core.generation.sampling import Sampling

Finish = Literal["end", "length", "context", "stopped"]
"""Why an answer ended: its end token, max_new_tokens, a full context, or the caller's wish."""


@dataclass(frozen=True)
class RoutingScope:
    """How adapters are chosen while a request is processed.

    Attributes:
        key: Everything that keys and values in a cache depend on besides the tokens. Requests with equal keys share a cache.
        enter: Makes the context manager in which every forward pass runs (forced routes, disabled adapters).
    """

    key: Hashable = None
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Requests of one batch may differ in everything but their routing scope.

    Attributes:
        ids: Token ids of the whole prompt, earlier turns included; at least one.
        sampling: How tokens are chosen.
        scope: How adapters are chosen.
        record: Whether routes are recorded; only for an answer that is streamed.
        read_from: Position from which tokens are read even if they are in the cache, so that their routes are recorded; None reads only what is not in it.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    scope: RoutingScope = RoutingScope()
    record: bool = False
    read_from: int | None = None


@dataclass(frozen=True)
class Reading:
    """A piece of the prompt was read.

    Attributes:
        done: Number of tokens read so far, of those that had to be read.
        total: Number of tokens that had to be read.
        reused: Number of tokens whose keys and values were in the cache.
        routes: (indices, weights), each (tokens, layers, k), of the tokens just read; None when nothing is recorded.
        paths: Paths of the recorded layers, in the order of the routes.
    """

    done: int
    total: int
    reused: int
    routes: tuple[Tensor, Tensor] | None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """One token of the answer.

    Attributes:
        id: Token id.
        text: The text that the token completes; may be empty.
        routes: (indices, weights), each (1, layers, k), of the pass that wrote the token; None when nothing is recorded.
    """

    id: int
    text: str
    routes: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: Why it ended.
        text: The whole answer.
        ids: Its tokens, without the end token.
        prompt_tokens: Number of tokens in the prompt.
        reused: Number of those that were in the cache.
        first_seconds: Seconds from the call to the first token.
        seconds: Seconds from the call to the last token.
        paths: Paths of the recorded layers, in the order of the routes.
    """

    reason: Finish
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    reused: int
    first_seconds: float
    seconds: float
    paths: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first; 0 when there are none."""
        after = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / after if len(self.ids) > 1 and after > 0 else 0.0


Event = Reading | Written | Finished
