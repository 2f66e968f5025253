"""Answers the requests of the protocol with a scheduler: names of models, prompts, options, and the events of an answer."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from meteora_core.errors import UsageError, did_you_mean
from meteora_core.generation.sampling import COLDEST
from meteora_core.routing import Meteora, RoutingOptions, find_meteora
from meteora_core.serving.engines import Engine
from meteora_core.serving.failures import ApiError, of_failure
from meteora_core.serving.grammars import ANY_OBJECT
from meteora_core.serving.jobs import Chosen, Done, Failed, Job, JobEvent
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.prompting import PromptWriter
from meteora_core.serving.protocol import ChatRequest, CompletionRequest, ResponseFormat, RoutingRequest
from meteora_core.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from meteora_core.chat.chat_model import ChatModel

Request = TypeVar("Request")
Plan = TypeVar("Plan")

BASE = "base"
"""The name of the model without adapters."""


@dataclass(frozen=True)
class ServiceOptions:
    """Values of the server that requests may leave out.

    Attributes:
        name: Name of the model whose gates choose.
        template: Prompt template of chats.
        max_new_tokens: Maximum number of tokens in an answer.
        top_k: Number of adapters per token; None for the checkpoint's.
        routing_temperature: Routing temperature; None for the checkpoint's.
    """

    name: str = "meteora"
    template: str = "auto"
    max_new_tokens: int = 1024
    top_k: int | None = None
    routing_temperature: float | None = None


@dataclass(frozen=True)
class Question:
    """One prompt with its options, ready for the scheduler.

    Attributes:
        ids: Token ids of the prompt.
        sampling: Sampling options.
        routing: Routing options.
        routes: Routes to report.
    """

    ids: Sequence[int]
    sampling: SamplingOptions
    routing: RoutingOptions
    routes: Literal["none", "mean", "layers"] = "none"


@dataclass
class Service:
    """A model with the engine that runs it.

    Attributes:
        chat_model: The model.
        scheduler: Its engine: the embedded scheduler, or vLLM.
        options: Values that requests may leave out.
        lock: Lock that is held while a request is planned, and while the bank changes.
    """

    chat_model: ChatModel
    scheduler: Engine
    options: ServiceOptions
    prompts: PromptWriter = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _state: Meteora | None = None

    def __post_init__(self) -> None:
        self.prompts = PromptWriter(self.chat_model, self.options.template)

    def planned(self, plan: Callable[[Service, Request], Plan], request: Request) -> Plan:
        """``plan(self, request)``, which waits while the bank changes."""
        with self.lock:
            return plan(self, request)

    @property
    def state(self) -> Meteora | None:
        """The model's routing state; while the bank changes, that before the change. None for a base model alone."""
        if self.chat_model.kind != "base":
            self._state = find_meteora(self.chat_model.model) or self._state
        return self._state

    @property
    def embedded(self) -> Scheduler:
        """The engine as the embedded scheduler. Raises UsageError if it is another one."""
        if not isinstance(self.scheduler, Scheduler):
            raise UsageError("this engine cannot change its bank", hint="start the server with --engine transformers")
        return self.scheduler

    # --- models ------------------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        state = self.state
        return () if state is None else state.names

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models: the routed one, the base model, and every adapter."""
        return tuple(dict.fromkeys((self.options.name, BASE, *self.adapters)))

    @property
    def defaults(self) -> RoutingOptions:
        """The routing options of a request that gives none."""
        state = self.state
        if state is None:
            return RoutingOptions(enabled=False)
        return RoutingOptions(self.options.top_k or state.top_k, self.options.routing_temperature or state.temperature, forced=self.chat_model.adapter)

    def routing(self, model: str, wanted: RoutingRequest | None) -> RoutingOptions:
        """The routing options of a request.

        Args:
            model: Name of the model.
            wanted: The request's field `meteora`.

        Raises:
            ApiError: The model is unknown, or the options contradict it.
            UsageError: The options do not fit the bank.
        """
        if model not in self.models:
            hint = did_you_mean(model, self.models) or "GET /v1/models lists the models"
            raise ApiError(404, f"The model `{model}` does not exist", hint=hint, param="model", code="model_not_found")
        wanted, options = wanted or RoutingRequest(), self.defaults
        chosen = wanted.force is not None or wanted.weights is not None or bool(wanted.mute) or wanted.top_k is not None or wanted.T is not None
        if model != self.options.name:
            if chosen:
                raise ApiError(
                    400, f"the model {model!r} does not choose adapters", hint=f"use the model {self.options.name!r} with the field meteora", param="meteora"
                )
            options = replace(options, forced=None, enabled=False) if model == BASE else replace(options, forced=model, enabled=True)
        elif chosen:
            if not self.adapters:
                raise ApiError(400, "this server's model has no adapters", param="meteora")
            if wanted.force is not None and wanted.force in wanted.mute:
                raise ApiError(400, f"the adapter {wanted.force!r} is both forced and muted", param="meteora")
            options = RoutingOptions(
                wanted.top_k or options.top_k, wanted.T or options.temperature, wanted.force or options.forced, frozenset(wanted.mute), wanted.weights
            )
        options.check(self.adapters)
        return options

    # --- questions ---------------------------------------------------------------------------------------------------------------

    def sampling(self, request: ChatRequest | CompletionRequest, grammar: str | None) -> SamplingOptions:
        """The sampling options of a request. Raises ApiError if a token of `logit_bias` does not exist."""
        bias = {}
        for token, value in (request.logit_bias or {}).items():
            if not token.isdecimal() or len(token) > 9 or not int(token) < self.scheduler.vocabulary:
                raise ApiError(400, f"logit_bias: {token!r} is not a token id below {self.scheduler.vocabulary}", param="logit_bias")
            bias[int(token)] = value
        if isinstance(request, ChatRequest):
            limit = request.max_completion_tokens or request.max_tokens or self.options.max_new_tokens
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            limit, logprobs = request.max_tokens or 16, request.logprobs
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        return SamplingOptions(
            max_new_tokens=limit,
            temperature=1.0 if request.temperature is None else request.temperature if request.temperature >= COLDEST else 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            stop=stop,
            logprobs=logprobs,
            logit_bias=bias,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            grammar=grammar,
            ignore_end=request.ignore_eos,
        )

    def grammar(self, form: ResponseFormat | None) -> str | None:
        """The grammar of a response format; None for any text. Raises UsageError if a schema cannot be used."""
        if form is None or form.type == "text":
            return None
        schema = ANY_OBJECT if form.json_schema is None else form.json_schema.schema_
        return self.scheduler.grammars.of_schema(schema)

    # --- answers -----------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def ask(self, questions: Sequence[Question]) -> AsyncIterator[AsyncIterator[tuple[int, JobEvent]]]:
        """Submit questions, and yield their events with the index of the question as they arrive. Leaving the block cancels what is not finished.

        Raises:
            ApiError: A question cannot be answered, or the server has too many.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, JobEvent]]()

        def sink(index: int) -> Any:
            def put(event: JobEvent) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

            return put

        jobs = [Job(question.ids, question.sampling, question.routing, sink(index), question.routes) for index, question in enumerate(questions)]
        try:
            self.scheduler.check_room(len(jobs))
            for job in jobs:
                self.scheduler.submit(job)
            yield _events(queue, len(jobs))
        finally:
            for job in jobs:
                job.cancel()

    async def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Submit questions, and return their complete answers in the same order.

        Raises:
            ApiError: A question cannot be answered, or the server has too many.
        """
        answers = [Answer() for _ in questions]
        async with self.ask(questions) as events:
            async for index, event in events:
                if failure := failure_of(event):
                    raise of_failure(failure)
                assert isinstance(event, Chosen | Done)
                answers[index].add(event)
        return answers


async def _events(queue: asyncio.Queue[tuple[int, JobEvent]], unfinished: int) -> AsyncIterator[tuple[int, JobEvent]]:
    while unfinished:
        index, event = await queue.get()
        if not isinstance(event, Chosen):
            unfinished -= 1
        yield index, event


@dataclass
class Answer:
    """The collected events of one answer.

    Attributes:
        tokens: The generated tokens.
        text: The text.
        done: The last event; None while the answer is not complete.
    """

    tokens: list[Chosen] = field(default_factory=list)
    text: str = ""
    done: Done | None = None

    def add(self, event: Chosen | Done) -> None:
        """Add an event."""
        self.text += event.text
        if isinstance(event, Chosen):
            self.tokens.append(event)
        else:
            self.done = event


def failure_of(event: JobEvent) -> Failed | None:
    """The event if it is a failure."""
    return event if isinstance(event, Failed) else None
