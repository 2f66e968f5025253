"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meteora_core.serving.bodies import DONE, finish, new_id, now, routed_token, routes_body, sse, text_logprobs, usage
from meteora_core.serving.failures import of_failure
from meteora_core.serving.jobs import Chosen, Done, JobEvent
from meteora_core.serving.protocol import CompletionRequest
from meteora_core.serving.service import Answer, Question, Service, failure_of


@dataclass(frozen=True)
class CompletionPlan:
    """A completion request, ready to be answered.

    Attributes:
        request: The request.
        questions: For each prompt, one question for each choice.
    """

    request: CompletionRequest
    questions: Sequence[Question]
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=now)


def plan_completion(service: Service, request: CompletionRequest) -> CompletionPlan:
    """Check a completion request and tokenise its prompts. Raises MeteoraError if a field cannot be used."""
    routing = service.routing(request.model, request.meteora)
    sampling = service.sampling(request, service.grammar(request.response_format))
    reported = "none" if request.meteora is None else request.meteora.reported
    questions = []
    for ids in (service.prompts.text(prompt) if isinstance(prompt, str) else prompt for prompt in _prompts(request)):
        for choice in range(request.n or 1):
            questions.append(Question(ids, replace(sampling, seed=(sampling.seed + choice) % 2**32), routing, reported))
    return CompletionPlan(request, questions)


def _prompts(request: CompletionRequest) -> Sequence[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


async def completion_body(service: Service, plan: CompletionPlan) -> dict[str, Any]:
    """The body of an answer that is sent as a whole."""
    answers = await service.answers(plan.questions)
    return {**_head(plan), "choices": [_choice(service, plan, index, answer) for index, answer in enumerate(answers)], "usage": _usage(plan, answers)}


def _head(plan: CompletionPlan) -> dict[str, Any]:
    return {"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.request.model}


def _usage(plan: CompletionPlan, answers: Sequence[Answer]) -> dict[str, Any]:
    """The usage. A prompt counts once, even if it has several choices."""
    count = plan.request.n or 1
    done = [answer.done for answer in answers if answer.done is not None]
    return usage(each if index % count == 0 else replace(each, prompt_tokens=0, cached_tokens=0) for index, each in enumerate(done))


def _choice(service: Service, plan: CompletionPlan, index: int, answer: Answer) -> dict[str, Any]:
    assert answer.done is not None
    tokenizer = service.chat_model.tokenizer
    choice: dict[str, Any] = {"index": index, "text": answer.text, "finish_reason": finish(answer.done), "logprobs": None}
    if plan.request.logprobs is not None:
        choice["logprobs"] = text_logprobs(tokenizer, answer.tokens, 0)
    if plan.questions[index].routes != "none":
        choice["meteora"] = routes_body(tokenizer, answer.tokens, service.adapters)
    return choice


async def completion_stream(service: Service, plan: CompletionPlan, events: AsyncIterator[tuple[int, JobEvent]]) -> AsyncIterator[bytes]:
    """The server-sent events of an answer."""
    request, tokenizer = plan.request, service.chat_model.tokenizer
    answers = [Answer() for _ in plan.questions]
    with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(index: int, text: str, **rest: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **rest}
        return sse({**_head(plan), "choices": [choice], **({"usage": None} if with_usage else {})})

    async for index, event in events:
        if failure := failure_of(event):
            yield sse(of_failure(failure).body)
            return
        assert isinstance(event, Chosen | Done)
        offset = len(answers[index].text)
        answers[index].add(event)
        if isinstance(event, Done):
            yield chunk(index, event.text, finish_reason=finish(event))
            continue
        rest: dict[str, Any] = {}
        if request.logprobs is not None:
            rest["logprobs"] = text_logprobs(tokenizer, [event], offset)
        if event.routes is not None:
            rest["meteora"] = {"tokens": [routed_token(tokenizer, event, service.adapters)]}
            if event.routes.paths and len(answers[index].tokens) == 1:
                rest["meteora"]["paths"] = list(event.routes.paths)
        if event.text or rest:
            yield chunk(index, event.text, **rest)
    if with_usage:
        yield sse({**_head(plan), "choices": [], "usage": _usage(plan, answers)})
    yield DONE
