"""The interface between the protocol and the engine that runs the model: the embedded scheduler, or vLLM."""

from __future__ import annotations

from typing import Any, Protocol

from meteora_core.serving.jobs import Job


class Grammar(Protocol):
    """Compiles the forms of answers."""

    def of_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of a JSON schema, for :attr:`SamplingOptions.grammar`. Raises UsageError if the schema cannot be used."""


class Sizes(Protocol):
    """Figures of a cache for the metrics."""

    @property
    def bytes(self) -> int:
        """Size in bytes."""


class PrefixFigures(Sizes, Protocol):
    """Figures of the prefix cache for the metrics."""

    @property
    def hits(self) -> int:
        """Number of prompt tokens that were found."""

    @property
    def queries(self) -> int:
        """Number of prompt tokens that were looked up."""


class Engine(Protocol):
    """Answers jobs.

    Attributes:
        version: Counter of the bank's changes.
        longest: Maximum number of tokens in prompt and answer.
        vocabulary: Number of tokens that the model computes logits for.
    """

    version: int
    longest: int
    vocabulary: int

    @property
    def grammars(self) -> Grammar:
        """Compiles the forms of answers."""

    @property
    def prefixes(self) -> PrefixFigures:
        """The prefix cache."""

    @property
    def slots(self) -> Sizes:
        """The keys and values of requests in progress."""

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in progress, and number of waiting requests."""

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""

    def start(self) -> None:
        """Start answering jobs. This is called in the server's event loop."""

    def close(self) -> None:
        """Stop all requests and the engine. This is called in a different thread from that of the event loop."""

    def check_room(self, count: int) -> None:
        """Raise QueueFull unless ``count`` more requests may wait."""

    def submit(self, job: Job) -> None:
        """Answer a job, whose events go to its sink. Raises UsageError if its prompt cannot be used, and QueueFull if too many requests wait."""
