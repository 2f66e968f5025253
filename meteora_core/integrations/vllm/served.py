"""The attributes of the configuration that the layers use."""

from __future__ import annotations

from typing import Protocol

from meteora_core.integrations.vllm.checkpoint import Store
from meteora_core.integrations.vllm.options import Options


class Served(Protocol):
    """The part of :class:`meteora_core.integrations.vllm.config.MeteoraConfig` that layers use.

    Attributes:
        widest: The largest number of outputs of layers whose weights may contain a copy of B in additional columns; 0 for no copies.
        count_every: Interval, in steps, at which the choices are counted; 0 for never.
        most_tokens: The largest number of tokens of a step; 0 if the kernels have the default options as constants.
    """

    widest: int
    count_every: int
    most_tokens: int

    @property
    def store(self) -> Store:
        """The checkpoint."""

    @property
    def default(self) -> Options:
        """The options of requests that set none."""

    def check_complete(self) -> None:
        """Raise ValueError if vLLM's model has no layers for some adapters."""
