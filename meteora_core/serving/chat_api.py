"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meteora_core.serving.bodies import DONE, chat_logprobs, finish, new_id, now, routed_token, routes_body, sse, usage
from meteora_core.serving.failures import ApiError, of_failure
from meteora_core.serving.jobs import Chosen, Done, JobEvent
from meteora_core.serving.protocol import ChatRequest, NamedTool, Tool
from meteora_core.serving.service import Answer, Question, Service, failure_of
from meteora_core.serving.tooling import Call, call_schema, calls_in, may_be_call


@dataclass(frozen=True)
class ChatPlan:
    """A chat request, ready to be answered.

    Attributes:
        request: The request.
        questions: One question for each choice.
        tools: Tools that the answer may call.
        forced_call: Whether the answer must be a call.
    """

    request: ChatRequest
    questions: Sequence[Question]
    tools: Sequence[Tool]
    forced_call: bool
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=now)


def plan_chat(service: Service, request: ChatRequest) -> ChatPlan:
    """Check a chat request and tokenise its prompt.

    Raises:
        ApiError: A field cannot be used.
        MeteoraError: The prompt or the routing options cannot be used.
    """
    routing = service.routing(request.model, request.meteora)
    tools, forced = _tools(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if forced and request.response_format is not None and request.response_format.type != "text":
        raise ApiError(400, "a required tool call and a response_format exclude each other", param="response_format")
    grammar = service.scheduler.grammars.of_schema(call_schema(tools)) if forced else service.grammar(request.response_format)
    ids = service.prompts.chat(request.messages, tools, routing)
    sampling = service.sampling(request, grammar)
    reported = "none" if request.meteora is None else request.meteora.reported
    questions = [Question(ids, replace(sampling, seed=(sampling.seed + choice) % 2**32), routing, reported) for choice in range(request.n or 1)]
    return ChatPlan(request, questions, tools, forced)


def _tools(request: ChatRequest) -> tuple[Sequence[Tool], bool]:
    """The tools that the answer may call, and whether it must call one."""
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(400, f"there is no tool named {choice.function.name!r}", param="tool_choice")
        return named, True
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
    return ([], False) if choice == "none" else (tools, choice == "required")


async def chat_body(service: Service, plan: ChatPlan) -> dict[str, Any]:
    """The body of an answer that is sent as a whole."""
    answers = await service.answers(plan.questions)
    return {
        "id": plan.id,
        "object": "chat.completion",
        "created": plan.created,
        "model": plan.request.model,
        "choices": [_choice(service, plan, index, answer) for index, answer in enumerate(answers)],
        "usage": _usage(answers),
    }


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The usage of several choices for one prompt, which counts once."""
    done = [answer.done for answer in answers if answer.done is not None]
    return usage([done[0], *(replace(other, prompt_tokens=0, cached_tokens=0) for other in done[1:])])


def _choice(service: Service, plan: ChatPlan, index: int, answer: Answer) -> dict[str, Any]:
    assert answer.done is not None
    tokenizer = service.chat_model.tokenizer
    calls = calls_in(answer.text, plan.tools) if plan.tools else []
    message: dict[str, Any] = {"role": "assistant", "content": None if calls else answer.text, "refusal": None}
    if calls:
        message["tool_calls"] = [_call_body(call) for call in calls]
    reason = finish(answer.done)
    choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": "tool_calls" if calls and reason == "stop" else reason, "logprobs": None}
    if plan.request.logprobs:
        choice["logprobs"] = chat_logprobs(tokenizer, answer.tokens)
    if plan.questions[index].routes != "none":
        choice["meteora"] = routes_body(tokenizer, answer.tokens, service.adapters)
    return choice


def _call_body(call: Call) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


@dataclass
class _Streamed:
    """What was sent of one choice."""

    answer: Answer = field(default_factory=Answer)
    held: str = ""
    holding: bool = False


async def chat_stream(service: Service, plan: ChatPlan, events: AsyncIterator[tuple[int, JobEvent]]) -> AsyncIterator[bytes]:
    """The server-sent events of an answer."""
    request, tokenizer, names = plan.request, service.chat_model.tokenizer, service.adapters
    head = {"id": plan.id, "object": "chat.completion.chunk", "created": plan.created, "model": request.model}
    with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(index: int, delta: dict[str, Any], **rest: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return sse({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    states = [_Streamed(holding=bool(plan.tools)) for _ in plan.questions]
    for index in range(len(states)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in events:
        if failure := failure_of(event):
            yield sse(of_failure(failure).body)
            return
        assert isinstance(event, Chosen | Done)
        state = states[index]
        state.answer.add(event)
        text = event.text
        if state.holding:
            state.held += text
            text = ""
            if not plan.forced_call and not may_be_call(state.held):
                text, state.held, state.holding = state.held, "", False
        if isinstance(event, Chosen):
            rest: dict[str, Any] = {}
            if request.logprobs:
                rest["logprobs"] = chat_logprobs(tokenizer, [event])
            if event.routes is not None:
                rest["meteora"] = {"tokens": [routed_token(tokenizer, event, names)]}
                if event.routes.paths and len(state.answer.tokens) == 1:
                    rest["meteora"]["paths"] = list(event.routes.paths)
            if text or rest:
                yield chunk(index, {"content": text} if text else {}, **rest)
            continue
        calls = calls_in(state.held, plan.tools) if state.holding else []
        if calls:
            yield chunk(index, {"tool_calls": [{"index": number, **_call_body(call)} for number, call in enumerate(calls)]})
        elif text or state.held:
            yield chunk(index, {"content": text or state.held})
        reason = finish(event)
        yield chunk(index, {}, finish_reason="tool_calls" if calls and reason == "stop" else reason)
    if with_usage:
        yield sse({**head, "choices": [], "usage": _usage([state.answer for state in states])})
    yield DONE
