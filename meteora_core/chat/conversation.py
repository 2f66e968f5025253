"""The base class of conversations with local models and with servers: turns, settings, and the choice of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meteora_core.chat.options import Option, check_option, options_for
from meteora_core.chat.prompts import Encoded, Turn
from meteora_core.data.frames import INST, Frame, with_system
from meteora_core.data.rows import iter_rows
from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.generation.requests import Event
from meteora_core.generation.sampling import Sampling
from meteora_core.json_files import write_jsonl
from meteora_core.trace.picture import RoutePicture


@dataclass(frozen=True)
class Mode:
    """The choice of adapters, on which the keys and values in the cache depend.

    Attributes:
        top_k: Number of adapters per token and layer.
        routing_temperature: Routing temperature T; divides the gate logits before the softmax.
        forced: Name of the only adapter in use, or None if the gates choose.
        muted: Names of adapters that are never chosen.
        enabled: Whether adapters are used at all; False for the bare base model.
    """

    top_k: int = 1
    routing_temperature: float = 1.0
    forced: str | None = None
    muted: frozenset[str] = frozenset()
    enabled: bool = True

    def describe(self) -> str:
        """A short description for users."""
        if not self.enabled:
            return "base model"
        if self.forced is not None:
            return f"forced: {self.forced}"
        muted = f", without {', '.join(sorted(self.muted))}" if self.muted else ""
        return f"gates: top {self.top_k}, T {self.routing_temperature:g}{muted}"


@dataclass(frozen=True)
class Compared:
    """One event of :meth:`Conversation.compare`.

    Attributes:
        column: Index of the answer that the event belongs to.
        columns: Number of answers.
        label: Description of the model that gives the answer.
        event: Event of the engine.
    """

    column: int
    columns: int
    label: str
    event: Event


@dataclass(frozen=True)
class AdapterRow:
    """An adapter in the list of a model's adapters.

    Attributes:
        name: Name of the adapter.
        rank: Rank of the adapter; None if it is unknown.
        alpha: LoRA alpha as text; empty if it is unknown.
        source: Origin of the adapter; empty if it is unknown.
    """

    name: str
    rank: int | None = None
    alpha: str = ""
    source: str = ""


class Conversation(ABC):
    """A conversation with one model.

    Attributes:
        sampling: Settings that choose the tokens and limit their number.
        system: System text at the beginning of the conversation, or None.
        turns: The turns so far.
        mode: The choice of adapters.
        most_temperature: Largest sampling temperature.
    """

    most_temperature: float = 5.0

    def __init__(self, sampling: Sampling, system: str | None) -> None:
        self.sampling = sampling
        self.system = system or None
        self.turns: list[Turn] = []
        self.mode = Mode(enabled=False)

    # --- the model -------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def title(self) -> str:
        """Description of the model, in one line."""

    @property
    @abstractmethod
    def template(self) -> str:
        """Name of the prompt frame."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the adapters; empty for a model without adapters."""

    @abstractmethod
    def adapter_rows(self) -> Sequence[AdapterRow]:
        """The adapters, in the order of :attr:`names`."""

    @abstractmethod
    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of tokens, of which a character that is spread over several belongs to the last."""

    @abstractmethod
    def check_adapters(self) -> None:
        """Raise UsageError if the model has no adapters."""

    @property
    def rows_frame(self) -> Frame:
        """The prompt frame of the rows that :meth:`save` writes and :meth:`load` reads."""
        from meteora_core.data.frames import RAW

        return RAW

    # --- talking ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def ask(self, message: str, *, record: bool = False, stop: Callable[[], bool] = lambda: False) -> Iterator[Event | Encoded]:
        """Answer a message. The turn is added to the conversation when the answer is complete or has been stopped.

        Args:
            message: Text of the user's message.
            record: Whether Written events carry routes.
            stop: Function that is called often; the answer ends once it returns True.

        Yields:
            First the encoded prompt, whose ``notice`` says what was left out and whether the message already had the template; then the events of
            the answer. A turn that is stopped before its first token is not added.

        Raises:
            UsageError: The message is empty, or the prompt does not fit into the model's context.
        """

    @abstractmethod
    def picture(self, *, last_turn: bool = False, on_read: Callable[[int], None] = lambda count: None) -> RoutePicture:
        """The routes of the conversation.

        Args:
            last_turn: Whether to show only the last turn.
            on_read: Function called with the number of tokens in each chunk that was read.

        Raises:
            UsageError: There is no answer yet, or the model has no adapters.
        """

    @abstractmethod
    def compare(self, *, adapter: str | None = None, message: str | None = None, stop: Callable[[], bool] = lambda: False) -> Iterator[Compared]:
        """Answer one message by the base model, by one adapter and by the gates, one after the other. The conversation does not change.

        Args:
            adapter: Name of the single adapter. None means the forced adapter if there is one, else the one with the largest weight in the last answer,
                else the first.
            message: Text of the message; None repeats the last one.
            stop: Function that is called often; the comparison ends once it returns True.

        Raises:
            UsageError: There is no message, the adapter is unknown, or the model has no adapters.
        """

    def new(self) -> None:
        """Start a new conversation with the same settings."""
        self.turns = []

    def set_system(self, text: str | None) -> None:
        """Replace the system text of the whole conversation. None or an empty text removes it."""
        self.system = text or None

    # --- adapters --------------------------------------------------------------------------------------------------------------

    def use(self, name: str | None) -> None:
        """Force one adapter, or let the gates choose again if ``name`` is None. Raises UsageError for an unknown name."""
        self.check_name(name)
        self.mode = replace(self.mode, forced=name)

    def mute(self, name: str) -> bool:
        """Mute an adapter, so that it is never chosen, or unmute a muted one. Returns whether the adapter is muted now.

        Raises:
            UsageError: The name is unknown, or all other adapters are muted already.
        """
        self.check_name(name)
        muted = self.mode.muted ^ {name}
        if len(muted) == len(self.names):
            raise UsageError(f"{name} is the last adapter that is not muted", hint="unmute another one first: /mute NAME a second time")
        self.mode = replace(self.mode, muted=muted)
        return name in muted

    def check_name(self, name: str | None) -> None:
        """Raise UsageError if there are no adapters, or none with this name."""
        self.check_adapters()
        names = self.names
        if name is not None and name not in names:
            raise UsageError(f"no adapter named {name!r}", hint=did_you_mean(name, names) or f"the adapters are: {', '.join(names)}")

    # --- settings --------------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Option]:
        """The settings that :meth:`set` can change, by name."""
        return options_for(len(self.names), self.most_temperature)

    def set(self, name: str, value: str) -> None:
        """Change a setting. Raises UsageError for an unknown name or a value out of range, with a hint."""
        parsed = check_option(name, value, self.options())
        if name == "T":
            self.mode = replace(self.mode, routing_temperature=float(parsed))
        elif name == "top-k":
            self.mode = replace(self.mode, top_k=int(parsed))
        else:
            changed: dict[str, Any] = {name.replace("-", "_"): parsed}
            self.sampling = replace(self.sampling, **changed)

    def values(self) -> dict[str, float | int]:
        """The current settings, by the names that :meth:`set` takes."""
        sampling = self.sampling
        values: dict[str, float | int] = {
            "max-new-tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top-p": sampling.top_p,
            "seed": sampling.seed,
        }
        return {**values, "T": self.mode.routing_temperature, "top-k": self.mode.top_k} if self.names else values

    # --- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> int:
        """Write the conversation as training rows, one per turn. Returns their number.

        The prompts have the frame :attr:`rows_frame`. The first prompt includes the system text.

        Raises:
            UsageError: There are no turns.
            StorageError: The file cannot be written.
        """
        if not self.turns:
            raise UsageError("there is nothing to save yet", hint="ask something first")
        rows = []
        for number, turn in enumerate(self.turns):
            message = turn.message if number else with_system(turn.message, self.system)
            rows.append({"prompt": self.rows_frame.around(message), "response": turn.answer or ""})
        return write_jsonl(path, rows)

    def load(self, path: Path) -> int:
        """Replace the conversation by the rows of a file. Returns their number. An invalid file leaves the conversation unchanged.

        Raises:
            DataError: The file is missing, has no rows, or has an invalid line, which the message names.
        """
        turns = []
        start = with_system("", self.system)
        for number, row in enumerate(iter_rows(path, hint="each line is a JSON object with prompt and response, as /save writes them")):
            candidates = (frame.inside(row.prompt) for frame in (self.rows_frame, INST))
            message = next((candidate for candidate in candidates if candidate is not None), row.prompt)
            turns.append(Turn(message.removeprefix(start) if number == 0 else message, row.response))
        if not turns:
            raise DataError(f"{path} has no rows", hint="each line is a JSON object with prompt and response, as /save writes them")
        self.new()
        self.turns = turns
        return len(turns)
