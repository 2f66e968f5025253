"""A conversation with a model of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from meteora_core.adapters.base_route import is_base_route
from meteora_core.chat.chat_model import ChatModel
from meteora_core.chat.conversation import AdapterRow, Compared, Conversation, Mode
from meteora_core.chat.options import check_option
from meteora_core.chat.prompts import Encoded, Turn, encode, fit
from meteora_core.data.frames import INST, RAW, Frame, pick_frame
from meteora_core.errors import UsageError
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Event, Finished, Request, RoutingScope, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.generation.text import token_texts
from meteora_core.routing import Meteora
from meteora_core.trace.picture import Role, RoutePicture
from meteora_core.trace.record import trace_tokens


class ChatSession(Conversation):
    """A conversation with a model of this process.

    Args:
        chat_model: The model that answers.
        sampling: Initial sampling settings.
        template: Prompt template: "auto" (the frame that the model was trained on), "chat", "inst", "raw", or a text with ``{}`` for the message.
        system: System text at the beginning of the conversation, or None.
        top_k: Number of adapters per token and layer; None keeps the checkpoint's.
        routing_temperature: Routing temperature; None keeps the checkpoint's.
        cuda_graphs: Kind of cache, as for :class:`~meteora_core.generation.engine.Engine`.

    Raises:
        UsageError: The template cannot be used, or ``top_k`` or ``routing_temperature`` is out of range.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        sampling: Sampling = Sampling(),
        *,
        template: str = "auto",
        system: str | None = None,
        top_k: int | None = None,
        routing_temperature: float | None = None,
        cuda_graphs: Literal["auto", "on", "off"] = "auto",
    ) -> None:
        super().__init__(sampling, system)
        self.chat_model = chat_model
        self._graphs = cuda_graphs
        self.engine = Engine(chat_model.model, chat_model.tokenizer, cuda_graphs)
        self._wish = template
        self._frames: dict[str, Frame] = {}
        self._first_turn = 0
        self._last: tuple[Encoded, Mode] | None = None
        state = chat_model.routing
        for name, value in (("top-k", top_k), ("T", routing_temperature)):
            if value is not None:
                check_option(name, str(value), self.options())
        if state is not None:
            self.mode = Mode(top_k or state.top_k, routing_temperature or state.temperature, chat_model.adapter)
        pick_frame(template, RAW, chat_model.tokenizer)

    def frame_of(self, mode: Mode) -> Frame:
        """The prompt frame for ``mode``: the template that the user chose, or with "auto" the frame that the adapter or the gates were trained on."""
        key = "" if not mode.enabled else mode.forced or "gates"
        if key not in self._frames:
            self._frames[key] = pick_frame(self._wish, self.chat_model.frame(mode.forced, base=not mode.enabled), self.chat_model.tokenizer)
        return self._frames[key]

    @property
    def frame(self) -> Frame:
        """The prompt frame for the current mode."""
        return self.frame_of(self.mode)

    @property
    def template(self) -> str:
        """Name of the prompt frame: "chat", "inst", "raw", or its text with ``{}`` for the message."""
        return self.frame.name

    # --- talking ---------------------------------------------------------------------------------------------------------------

    def ask(self, message: str, *, record: bool = False, stop: Callable[[], bool] = lambda: False) -> Iterator[Event | Encoded]:
        """Answer a message. The turn is added to the conversation when the answer is complete or has been stopped.

        Args:
            message: Text of the user's message.
            record: Whether to record routes, which Reading and Written events then carry.
            stop: Function called before every forward pass; the answer ends once it returns True.

        Yields:
            First the encoded prompt, whose ``notice`` says what was left out and whether the message already had the template; then the events of
            :meth:`Engine.stream`. A turn that is stopped before its first token is not added.

        Raises:
            UsageError: The message is empty, or the prompt does not fit into the model's context.
        """
        if not message.strip():
            raise UsageError("the message is empty", hint="write something first")
        message, note = self._bare(message)
        turns = [*self.turns, Turn(message)]
        encoded = fit(self.chat_model.tokenizer, self.frame, self.system, turns, self.engine.context, self.sampling.max_new_tokens, self._first_turn)
        if note:
            encoded = replace(encoded, notice="; ".join(filter(None, (note, encoded.notice))))
        mode = self.mode
        yield encoded
        for event in self._generate(self.engine, encoded, mode, record and mode.enabled, stop):
            if isinstance(event, Finished) and (event.ids or event.reason != "stopped"):
                self.turns.append(Turn(message, event.text, event.ids, event.reason == "end"))
                self._first_turn = encoded.first_turn
                self._last = (encoded, mode)
            yield event

    def _bare(self, message: str) -> tuple[str, str | None]:
        """Remove the prompt frame from a message that already has it. Returns the message and a notice, which is None if there was no frame."""
        current = self.frame
        candidates = [frame for frame in (current, INST) if frame.before.strip()] if current.name != "raw" else []
        for frame in candidates:
            bare = frame.inside(message)
            if bare is not None and bare.strip() and frame.before.strip() not in bare and (not frame.after.strip() or frame.after.strip() not in bare):
                name = "[INST] … [/INST]" if frame == INST else "the template"
                return bare, f"the message already contains {name}, so the template is not applied again"
        return message, None

    def _generate(self, engine: Engine, encoded: Encoded, mode: Mode, record: bool, stop: Callable[[], bool]) -> Iterator[Event]:
        read_from = encoded.last_start if record else None
        scope = RoutingScope(mode, self._scope(mode))
        return engine.stream(Request(encoded.ids, self.sampling, scope, record, read_from), stop)

    def _scope(self, mode: Mode) -> Callable[[], AbstractContextManager[Any]]:
        state = self.chat_model.routing
        return nullcontext if state is None else lambda: routing_mode(state, mode)

    def new(self) -> None:
        """Start a new conversation with the same settings."""
        super().new()
        self._first_turn, self._last = 0, None
        self.engine.forget()

    # --- the model -------------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Description of the model, in one line."""
        return self.chat_model.title

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters; empty for a base model."""
        state = self.chat_model.routing
        return () if state is None else state.names

    @property
    def rows_frame(self) -> Frame:
        """The prompt frame of the current mode."""
        return self.frame

    def adapter_rows(self) -> list[AdapterRow]:
        """The adapters with their ranks and sources. Raises UsageError for a bare base model."""
        return [
            AdapterRow(
                adapter.name,
                adapter.rank,
                f"{adapter.alpha:g}" + (" rs" if adapter.rslora else ""),
                "the base model alone" if is_base_route(adapter) else str(adapter.source),
            )
            for adapter in self.state().adapters
        ]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of tokens, of which a character that is spread over several belongs to the last."""
        return token_texts(self.chat_model.tokenizer, ids)

    def state(self) -> Meteora:
        """The model's Meteora object. Raises UsageError for a bare base model."""
        state = self.chat_model.routing
        if state is None:
            raise UsageError("this is the base model alone, without adapters", hint="start `meteora chat` with --checkpoint or --adapter")
        return state

    def check_adapters(self) -> None:
        """Raise UsageError for a bare base model."""
        self.state()

    # --- looking back ----------------------------------------------------------------------------------------------------------

    def picture(self, *, last_turn: bool = False, on_read: Callable[[int], None] = lambda count: None) -> RoutePicture:
        """The routes of the conversation, computed by reading it once more with the settings of the last answer.

        Args:
            last_turn: Whether to show only the last message and its answer. The whole conversation is read in either case.
            on_read: Function called with the number of tokens in each chunk that was read.

        Raises:
            UsageError: There is no answer yet, or the model has no adapters.
        """
        state = self.state()
        if self._last is None or not self.turns:
            raise UsageError("there is no answer yet", hint="ask something first")
        encoded, mode = self._last
        ids = [*encoded.ids, *self.turns[-1].ids]
        roles: list[Role] = [*encoded.roles, *(["answer"] * len(self.turns[-1].ids))]  # type: ignore[list-item]
        with routing_mode(state, mode):
            picture = trace_tokens(self.chat_model.model, self.chat_model.tokenizer, ids, roles, about=self.about(mode), on_read=on_read)
        return picture.since(encoded.last_start) if last_turn else picture

    def about(self, mode: Mode | None = None) -> dict[str, str]:
        """Captions of a picture: the model, the routing settings and the template."""
        mode = mode or self.mode
        return {"model": self.chat_model.title, "routing": mode.describe(), "template": self.frame_of(mode).name}

    def compare(self, *, adapter: str | None = None, message: str | None = None, stop: Callable[[], bool] = lambda: False) -> Iterator[Compared]:
        """Answer one message by the base model, by one adapter and by the gates, one after the other. The conversation does not change.

        All three see the same earlier turns. With the template "auto", each uses the prompt frame that it was trained on.

        Args:
            adapter: Name of the single adapter. None means the forced adapter if there is one, else the one with the largest weight in the last answer,
                else the first.
            message: Text of the message; None repeats the last one.
            stop: Function called before every forward pass; the comparison ends once it returns True.

        Raises:
            UsageError: There is no message, the adapter is unknown, or the model has no adapters.
        """
        state = self.state()
        self.check_name(adapter)
        if message is None and not self.turns:
            raise UsageError("there is nothing to compare yet", hint="ask something first, or write /compare NAME QUESTION")
        turns = [*self.turns, Turn(self._bare(message)[0])] if message is not None else [*self.turns[:-1], Turn(self.turns[-1].message)]
        adapter = adapter or self.mode.forced or self._main_adapter(state)
        columns = [("base", replace(self.mode, enabled=False)), (f"adapter {adapter}", replace(self.mode, forced=adapter))]
        if self.chat_model.kind == "meteora":
            columns.append(("MeteoRA", replace(self.mode, forced=None)))
        for column, (label, mode) in enumerate(columns):
            frame = self.frame_of(mode)
            encoded = fit(self.chat_model.tokenizer, frame, self.system, turns, self.engine.context, self.sampling.max_new_tokens, self._first_turn)
            for event in self._generate(Engine(self.chat_model.model, self.chat_model.tokenizer, self._graphs), encoded, mode, False, stop):
                yield Compared(column, len(columns), f"{label} ({frame.name})", event)
            if stop():
                return

    def _main_adapter(self, state: Meteora) -> str:
        if self._last is None or not self.turns or not self.turns[-1].ids:
            return state.names[0]
        return state.names[int(self.picture(last_turn=True).total("answer").argmax())]

    # --- files -----------------------------------------------------------------------------------------------------------------

    def load(self, path: Path) -> int:
        """Replace the conversation by the rows of a file; see :meth:`Conversation.load`."""
        count = super().load(path)
        encoded = encode(self.chat_model.tokenizer, self.frame, self.system, self.turns)
        ids = self.chat_model.tokenizer(self.turns[-1].answer or "", add_special_tokens=False)["input_ids"]
        self.turns[-1] = replace(self.turns[-1], ids=tuple(int(token) for token in ids))
        fits = self.engine.context is None or len(encoded.ids) + len(ids) <= self.engine.context
        self._last = (encoded, self.mode) if fits else None
        return count


@contextmanager
def routing_mode(state: Meteora, mode: Mode) -> Iterator[None]:
    """Context manager in which the model routes according to ``mode``."""
    before = state.routing
    with ExitStack() as stack:
        if not mode.enabled:
            stack.enter_context(state.disabled())
        elif mode.forced is not None:
            stack.enter_context(state.force(mode.forced))
        state.top_k, state.temperature = mode.top_k, mode.routing_temperature
        state.mute(mode.muted)
        try:
            yield
        finally:
            state.routing = before


__all__ = ["ChatSession", "Compared", "Mode", "Written", "routing_mode"]
