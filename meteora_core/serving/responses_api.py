"""`POST /v1/responses` for text. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from meteora_core.serving.bodies import new_id, now, routed_token, routes_body, sse
from meteora_core.serving.failures import of_failure
from meteora_core.serving.jobs import Chosen, Done, JobEvent
from meteora_core.serving.protocol import ChatMessage, ChatRequest, JsonSchema, ResponseFormat, ResponsesRequest
from meteora_core.serving.service import Answer, Question, Service, failure_of


@dataclass(frozen=True)
class ResponsePlan:
    """A request of the responses API, ready to be answered.

    Attributes:
        request: The request.
        question: The prompt with its options.
    """

    request: ResponsesRequest
    question: Question
    id: str = field(default_factory=lambda: new_id("resp"))
    item: str = field(default_factory=lambda: new_id("msg"))
    created: int = field(default_factory=now)


def plan_response(service: Service, request: ResponsesRequest) -> ResponsePlan:
    """Check a request and tokenise its prompt. Raises MeteoraError if a field cannot be used."""
    if isinstance(request.input, str):
        messages = [ChatMessage(role="user", content=request.input)]
    else:
        messages = [ChatMessage(role=message.role, content=message.content) for message in request.input]
    if request.instructions:
        messages.insert(0, ChatMessage(role="system", content=request.instructions))
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_output_tokens,
        response_format=_format(request),
    )
    routing = service.routing(request.model, request.meteora)
    sampling = service.sampling(chat, service.grammar(chat.response_format))
    reported = "none" if request.meteora is None else request.meteora.reported
    return ResponsePlan(request, Question(service.prompts.chat(messages, [], routing), sampling, routing, reported))


def _format(request: ResponsesRequest) -> ResponseFormat | None:
    if request.text is None or request.text.format.type == "text":
        return None
    wanted = request.text.format
    schema = JsonSchema(name=wanted.name or "answer", schema=wanted.schema_ or {}) if wanted.type == "json_schema" else None
    return ResponseFormat(type=wanted.type, json_schema=schema)


async def response_body(service: Service, plan: ResponsePlan) -> dict[str, Any]:
    """The body of an answer that is sent as a whole."""
    answer = Answer()
    async with service.ask([plan.question]) as events:
        async for _, event in events:
            if failure := failure_of(event):
                raise of_failure(failure)
            assert isinstance(event, Chosen | Done)
            answer.add(event)
    return _body(service, plan, answer)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _item(plan: ResponsePlan, answer: Answer) -> dict[str, Any]:
    status = "in_progress" if answer.done is None else _status(answer)
    content = [] if answer.done is None else [_part(answer.text)]
    return {"type": "message", "id": plan.item, "status": status, "role": "assistant", "content": content}


def _status(answer: Answer) -> str:
    assert answer.done is not None
    return "incomplete" if answer.done.reason == "length" else "completed"


def _body(service: Service, plan: ResponsePlan, answer: Answer) -> dict[str, Any]:
    request, sampling, done = plan.request, plan.question.sampling, answer.done
    status = "in_progress" if done is None else _status(answer)
    body: dict[str, Any] = {
        "id": plan.id,
        "object": "response",
        "created_at": plan.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [] if done is None else [_item(plan, answer)],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": sampling.top_p,
        "usage": None,
    }
    if done is not None:
        body["usage"] = {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens},
            "output_tokens": done.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.prompt_tokens + done.tokens,
        }
        if plan.question.routes != "none":
            body["meteora"] = routes_body(service.chat_model.tokenizer, answer.tokens, service.adapters)
    return body


async def response_stream(service: Service, plan: ResponsePlan, events: AsyncIterator[tuple[int, JobEvent]]) -> AsyncIterator[bytes]:
    """The server-sent events of an answer."""
    answer, number = Answer(), -1

    def message(kind: str, **values: Any) -> bytes:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number, **values}, kind)

    place = {"item_id": plan.item, "output_index": 0, "content_index": 0}
    yield message("response.created", response=_body(service, plan, answer))
    yield message("response.in_progress", response=_body(service, plan, answer))
    yield message("response.output_item.added", output_index=0, item=_item(plan, answer))
    yield message("response.content_part.added", **place, part=_part(""))
    async for _, event in events:
        if failure := failure_of(event):
            error = of_failure(failure).body["error"]
            yield message("error", code=error["code"], message=error["message"], param=error["param"])
            return
        assert isinstance(event, Chosen | Done)
        answer.add(event)
        routes = {}
        if isinstance(event, Chosen) and event.routes is not None:
            routes = {"meteora": {"tokens": [routed_token(service.chat_model.tokenizer, event, service.adapters)]}}
        if event.text or routes:
            yield message("response.output_text.delta", **place, delta=event.text, logprobs=[], **routes)
    yield message("response.output_text.done", **place, text=answer.text, logprobs=[])
    yield message("response.content_part.done", **place, part=_part(answer.text))
    yield message("response.output_item.done", output_index=0, item=_item(plan, answer))
    yield message(f"response.{_status(answer)}", response=_body(service, plan, answer))
