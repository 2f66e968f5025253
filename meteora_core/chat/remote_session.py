"""A conversation with a model on a server that has OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.chat.conversation import AdapterRow, Compared, Conversation, Mode
from meteora_core.chat.options import check_option
from meteora_core.chat.prompts import Encoded, Turn
from meteora_core.chat.remote_client import AdapterListing, RemoteClient
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.generation.requests import Event, Finished, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.trace.picture import RoutePicture, Token

TOO_LONG = "maximum context length"
"""Part of the error message of servers with OpenAI's API if a conversation does not fit into the context."""


@dataclass
class _Routed:
    """The routes of one answer: its tokens, and for each the (indices, weights) of every layer, (1, layers, k)."""

    mode: Mode
    tokens: list[Token] = field(default_factory=list)
    routes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    paths: tuple[str, ...] = ()


class RemoteSession(Conversation):
    """A conversation with a model on a server.

    On a Meteora server, adapters can be forced and muted, and the routes of answers are known. Other servers only generate answers.

    Args:
        client: Client of the server.
        sampling: Initial sampling settings.
        model: Name of the model; None for the routed model, or the first one in the server's list.
        system: System text at the beginning of the conversation, or None.
        adapter: Name of the adapter that is forced at the start, or None.
        top_k: Number of adapters per token and layer; None for the server's.
        routing_temperature: Routing temperature; None for the server's.

    Raises:
        UsageError: The server has no such model or adapter, or a value is out of range.
        MeteoraError: The server cannot be reached.

    Example:
        >>> from meteora_core.chat.remote_client import RemoteClient
        >>> session = RemoteSession(RemoteClient("http://127.0.0.1:8000"))  # doctest: +SKIP
        >>> for event in session.ask("Hello"): ...  # doctest: +SKIP
    """

    most_temperature = 2.0

    def __init__(
        self,
        client: RemoteClient,
        sampling: Sampling = Sampling(),
        *,
        model: str | None = None,
        system: str | None = None,
        adapter: str | None = None,
        top_k: int | None = None,
        routing_temperature: float | None = None,
    ) -> None:
        super().__init__(sampling, system)
        self.client = client
        models = client.models()
        if not models:
            raise UsageError(f"{client.url} serves no model", hint="check the server")
        listing = client.adapters()
        self.model = model or (listing.model if listing is not None else models[0])
        if self.model not in models:
            hint = did_you_mean(self.model, models) or f"the models are: {', '.join(models[:20])}"
            raise UsageError(f"the server has no model named {self.model!r}", hint=hint)
        self._listing: AdapterListing | None = listing if listing is not None and self.model == listing.model else None
        self._routed: list[_Routed | None] = []
        self._first_turn = 0
        for name, value in (("top-k", top_k), ("T", routing_temperature), ("temperature", sampling.temperature)):
            if value is not None:
                check_option(name, str(value), self.options())
        if self._listing is not None:
            self.mode = Mode(top_k or self._listing.top_k, routing_temperature or self._listing.temperature)
        if adapter is not None:
            self.use(adapter)

    # --- the model -------------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The model and the server."""
        base = f" ({self._listing.base}, {len(self.names)} adapters)" if self._listing is not None else ""
        return f"{self.model}{base} at {self.client.url}"

    @property
    def template(self) -> str:
        """The server chooses the prompt frame."""
        return "of the server"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters; empty if the server is not a Meteora server."""
        return () if self._listing is None else self._listing.names

    def adapter_rows(self) -> list[AdapterRow]:
        """The adapters with their ranks."""
        self.check_adapters()
        assert self._listing is not None
        return [AdapterRow(name, rank, source="the server") for name, rank in zip(self._listing.names, self._listing.ranks, strict=True)]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """An empty list, because the server tokenises the prompts."""
        return []

    def check_adapters(self) -> None:
        """Raise UsageError if the server is not a Meteora server, or the model is not the routed one."""
        if self._listing is None:
            raise UsageError(f"{self.model} at {self.client.url} has no adapters to choose from", hint="`meteora serve` serves a model that has")

    # --- talking ---------------------------------------------------------------------------------------------------------------

    def ask(self, message: str, *, record: bool = False, stop: Callable[[], bool] = lambda: False) -> Iterator[Event | Encoded]:
        """Answer a message; see :meth:`Conversation.ask`. If the conversation does not fit into the context, its oldest turns are left out.

        Raises:
            UsageError: The message is empty or too long, or the server refuses it.
            MeteoraError: The server cannot be reached, or fails.
        """
        if not message.strip():
            raise UsageError("the message is empty", hint="write something first")
        first, mode, routed = self._first_turn, self.mode, _Routed(self.mode)
        while True:
            try:
                events = self._answer([*self.turns[first:], Turn(message)], mode, routed, stop)
                head = next(events)
                break
            except UsageError as error:
                if TOO_LONG not in error.message or first >= len(self.turns):
                    raise
                first += 1
        notice = f"the conversation is too long: {_turns(first)} left out" if first > self._first_turn else None
        yield Encoded([], [], notice, first)
        event: Event | None = head
        while event is not None:
            if isinstance(event, Finished) and (event.length or event.reason != "stopped"):
                self.turns.append(Turn(message, event.text, event.ids, event.reason == "end"))
                self._routed.append(routed if routed.tokens else None)
                self._first_turn = first
            yield event if record or not isinstance(event, Written) else replace(event, routes=None)
            event = next(events, None)

    def _answer(self, turns: Sequence[Turn], mode: Mode, routed: _Routed, stop: Callable[[], bool]) -> Iterator[Event]:
        """The events of an answer to the last of some turns; routes are added to ``routed``."""
        began = time.perf_counter()
        first, reason, text, count, usage = 0.0, None, [], 0, {}
        for chunk in self.client.chat(self._body(turns, mode), stop):
            if chunk.get("usage"):
                usage = chunk["usage"]
            for choice in chunk.get("choices") or ():
                entries = (choice.get("meteora") or {}).get("tokens") or ()
                content = (choice.get("delta") or {}).get("content") or ""
                reason = choice.get("finish_reason") or reason
                routes = self._read(routed, choice["meteora"]) if entries else None
                if not content and not entries:
                    continue
                count += 1
                first = first or time.perf_counter() - began
                text.append(content)
                yield Written(int(entries[0]["id"]) if entries else -1, content, routes)
        ids = tuple(token.id for token in routed.tokens)
        length = int(usage.get("completion_tokens") or 0) if reason and usage.get("completion_tokens") else len(ids) or count
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        end = "stopped" if reason is None else "length" if reason == "length" else "end"
        seconds = time.perf_counter() - began
        yield Finished(end, "".join(text), ids, int(usage.get("prompt_tokens") or 0), int(cached), first, seconds, routed.paths, counted=length)  # type: ignore[arg-type]

    def _body(self, turns: Sequence[Turn], mode: Mode) -> dict[str, Any]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.message})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stream_options": {"include_usage": True},
        }
        if self._listing is None:
            return body
        if not mode.enabled:
            return {**body, "model": "base"}
        choice: dict[str, Any] = {"force": mode.forced} if mode.forced else {"mute": sorted(mode.muted)}
        return {**body, "meteora": {"top_k": mode.top_k, "T": mode.routing_temperature, **choice, "routes": "layers"}}

    def _read(self, routed: _Routed, found: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Add the tokens of a chunk to an answer. Returns the routes of the last of them."""
        index = {name: number for number, name in enumerate(self.names)}
        routed.paths = routed.paths or tuple(found.get("paths") or ())
        routes = None
        for entry in found["tokens"]:
            chosen = [[(index[name], float(weight)) for name, weight in layer.items() if name in index] for layer in entry.get("layers") or ()]
            routes = _tensors([chosen], max((len(layer) for layer in chosen), default=0) or 1)
            routed.tokens.append(Token(int(entry["id"]), str(entry["text"]), "answer"))
            routed.routes.append(routes)
        return routes

    # --- looking back ----------------------------------------------------------------------------------------------------------

    def new(self) -> None:
        """Start a new conversation with the same settings."""
        super().new()
        self._routed, self._first_turn = [], 0

    def load(self, path: Path) -> int:
        """Replace the conversation by the rows of a file; see :meth:`Conversation.load`. The routes of their answers are not known."""
        count = super().load(path)
        self._routed = [None] * count
        return count

    def picture(self, *, last_turn: bool = False, on_read: Callable[[int], None] = lambda count: None) -> RoutePicture:
        """The routes of the answers, as reported by the server. The routes of prompts are unknown.

        Args:
            last_turn: Whether to show only the last answer.
            on_read: Function called with the number of tokens.

        Raises:
            UsageError: There is no answer with routes.
        """
        self.check_adapters()
        known = [answer for answer in (self._routed[-1:] if last_turn else self._routed) if answer is not None and answer.routes]
        if not known:
            raise UsageError("there is no answer yet", hint="ask something first")
        layers = len(known[-1].paths)
        tokens = [token for answer in known for token in answer.tokens]
        routes = [pair for answer in known for pair in answer.routes if pair[0].shape[1] == layers]
        if len(routes) != len(tokens):
            raise UsageError("the server's model changed in this conversation", hint="start a new one: /new")
        most = max(indices.shape[2] for indices, _ in routes)
        indices = torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[2])) for part, _ in routes])
        weights = torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[2])) for _, part in routes])
        on_read(len(tokens))
        return RoutePicture(tuple(tokens), self.names, known[-1].paths, indices, weights, self.about(known[-1].mode))

    def about(self, mode: Mode | None = None) -> dict[str, str]:
        """Captions of a picture: the model and the routing settings."""
        return {"model": self.title, "routing": (mode or self.mode).describe()}

    def compare(self, *, adapter: str | None = None, message: str | None = None, stop: Callable[[], bool] = lambda: False) -> Iterator[Compared]:
        """Answer one message by the base model, by one adapter and by the gates; see :meth:`Conversation.compare`."""
        self.check_name(adapter)
        if message is None and not self.turns:
            raise UsageError("there is nothing to compare yet", hint="ask something first, or write /compare NAME QUESTION")
        turns = [*self.turns, Turn(message)] if message is not None else [*self.turns[:-1], Turn(self.turns[-1].message)]
        adapter = adapter or self.mode.forced or self._main_adapter()
        columns = (
            ("base", replace(self.mode, enabled=False)),
            (f"adapter {adapter}", replace(self.mode, forced=adapter)),
            ("MeteoRA", replace(self.mode, forced=None)),
        )
        for column, (label, mode) in enumerate(columns):
            for event in self._answer(turns[self._first_turn :], mode, _Routed(mode), stop):
                yield Compared(column, len(columns), label, event)
            if stop():
                return

    def _main_adapter(self) -> str:
        if not self._routed or self._routed[-1] is None:
            return self.names[0]
        return self.names[int(self.picture(last_turn=True).total("answer").argmax())]


def _tensors(rows: Sequence[Sequence[Sequence[tuple[int, float]]]], k: int) -> tuple[Tensor, Tensor]:
    """Indices int64 and weights float32, each (tokens, layers, k), of choices of unequal length, padded with weights of 0."""
    padded = [[[*layer, *[(layer[0][0] if layer else 0, 0.0)] * (k - len(layer))] for layer in row] for row in rows]
    layers = len(padded[0]) if padded else 0
    indices = torch.tensor([[[pair[0] for pair in layer] for layer in row] for row in padded], dtype=torch.int64).reshape(len(rows), layers, k)
    weights = torch.tensor([[[pair[1] for pair in layer] for layer in row] for row in padded]).reshape(len(rows), layers, k)
    return indices, weights


def _turns(count: int) -> str:
    return "the oldest turn is" if count == 1 else f"the {count} oldest turns are"
