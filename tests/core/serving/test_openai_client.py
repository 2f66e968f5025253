"""The official Python client of OpenAI against the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from support.chat_world import NAMES
from support.server import RunningServer
from support.serving import alone

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False},
        },
    }
]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-secret-key", max_retries=0, timeout=120) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["meteora", "base", *NAMES]
    assert client.models.retrieve("alpha").id == "alpha"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("delta")


def test_a_chat_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "messages": MESSAGES, "temperature": 0, "max_tokens": 15}
    whole = client.chat.completions.create(**options)
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert stream[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].usage is not None
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in stream}) == 1


def test_every_model_answers_as_its_routing_does_alone(client: openai.OpenAI, server: RunningServer) -> None:
    for name in ("meteora", "base", "beta"):
        answer = client.completions.create(model=name, prompt=[[5, 6, 7], [9, 10]], temperature=0, max_tokens=8, extra_body={"ignore_eos": True}, logprobs=0)
        routing = server.service.routing(name, None)
        for choice, ids in zip(answer.choices, ([5, 6, 7], [9, 10]), strict=True):
            expected = server.service.scheduler.exclusively(partial(alone, server.service.chat_model.model, ids, routing, 8))
            assert choice.logprobs is not None
            assert choice.logprobs.tokens == [server.service.chat_model.tokenizer.decode([token]) for token in expected]


def test_several_choices_differ_and_seeds_repeat_them(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "messages": MESSAGES, "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 10, "top_p": 0.95}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    other = client.chat.completions.create(**{**options, "seed": 8})
    assert texts != [choice.message.content for choice in other.choices]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="meteora", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    text = client.completions.create(model="meteora", prompt="ab", temperature=0, max_tokens=4, logprobs=2, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset[0] for chunk in text if chunk.choices[0].logprobs]
    assert offsets == sorted(offsets)


def test_stop_bias_and_penalties(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "prompt": "ab", "temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    plain = client.completions.create(**options).choices[0]
    assert plain.finish_reason == "length"
    cut = client.completions.create(**options, stop=[plain.text[3:5]]).choices[0]
    assert (cut.finish_reason, cut.text) == ("stop", plain.text[: plain.text.index(plain.text[3:5])])
    forced = client.completions.create(**options, logit_bias={"70": 100}).choices[0]
    assert len(set(forced.text)) == 1
    varied = client.completions.create(**options, logit_bias={"70": 8}, frequency_penalty=2, presence_penalty=2).choices[0]
    assert varied.text.count(forced.text[0]) < 20


def test_a_temperature_next_to_zero_takes_the_most_likely_token(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "prompt": "ab", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    greedy = client.completions.create(**options, temperature=0).choices[0].text
    for temperature in (1e-310, 1e-40, 1e-7):
        assert client.completions.create(**options, temperature=temperature, top_p=0.5).choices[0].text == greedy


def test_json_schema_and_json_object(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(model="meteora", messages=MESSAGES, response_format=form, temperature=1, seed=seed, max_tokens=60)
        value = json.loads(answer.choices[0].message.content or "")
        assert set(value) == {"n"}
        assert 0 <= value["n"] <= 99
        assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="schema"):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model="meteora", messages=MESSAGES, response_format=broken)


def test_tools(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "messages": MESSAGES, "tools": TOOLS, "temperature": 1, "seed": 3, "max_tokens": 120}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(**options, tool_choice=choice)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        call: Any = (answer.choices[0].message.tool_calls or [])[0]
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    chunks = list(client.chat.completions.create(**options, tool_choice="required", stream=True))
    deltas = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert deltas[0][0].function.name == "weather"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    turn: Any = [*MESSAGES, answer.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="meteora", messages=turn, tools=TOOLS, max_tokens=5).choices[0].finish_reason in ("length", "stop")
    free = client.chat.completions.create(**options, tool_choice="auto")
    assert free.choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="no tool named"):
        client.chat.completions.create(**options, tool_choice={"type": "function", "function": {"name": "other"}})


def test_routes_of_a_stream_are_those_of_the_answer(client: openai.OpenAI) -> None:
    options: Any = {"model": "meteora", "messages": MESSAGES, "temperature": 0, "max_tokens": 8, "extra_body": {"meteora": {"routes": "layers", "top_k": 2}}}
    whole: Any = client.chat.completions.create(**options)
    body = whole.choices[0].meteora
    stream: Any = client.chat.completions.create(**options, stream=True)
    tokens = [token for chunk in stream if hasattr(chunk.choices[0], "meteora") for token in chunk.choices[0].meteora["tokens"]]
    assert tokens == body["tokens"]
    assert len(tokens) == 8
    for token in tokens:
        assert abs(sum(token["weights"].values()) - 1) < 0.01
        assert len(token["layers"]) == len(body["paths"])
        assert all(1 <= len(layer) <= 2 for layer in token["layers"])
    forced: Any = client.chat.completions.create(**{**options, "extra_body": {"ignore_eos": True, "meteora": {"force": "gamma", "routes": True}}})
    assert forced.choices[0].meteora["shares"] == {"gamma": 1.0}
    muted: Any = client.chat.completions.create(**{**options, "extra_body": {"ignore_eos": True, "meteora": {"mute": ["alpha"], "routes": True, "T": 15}}})
    assert "alpha" not in muted.choices[0].meteora["shares"]
    weights = {"alpha": 0.5, "beta": 0.25}
    mixed: Any = client.chat.completions.create(**{**options, "extra_body": {"ignore_eos": True, "meteora": {"weights": weights, "routes": True}}})
    assert mixed.choices[0].meteora["tokens"][0]["weights"] == weights


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="meteora", input="Say something.", temperature=0, max_output_tokens=12)
    assert whole.status in ("completed", "incomplete")
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 12
    events = list(
        client.responses.create(model="meteora", input=[{"role": "user", "content": "Say something."}], temperature=0, max_output_tokens=12, stream=True)
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="meteora", input="x", previous_response_id="resp-1")


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other, pytest.raises(openai.AuthenticationError) as wrong:
        other.models.list()
    assert wrong.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="metoera", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    assert "did you mean 'meteora'" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="meteora", prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    for body, message in (
        ({"force": "delta"}, "no adapter named 'delta'"),
        ({"mute": list(NAMES)}, "all adapters would be muted"),
        ({"top_k": 4}, "top_k is 4"),
        ({"T": 0}, "T"),
        ({"force": "alpha", "mute": ["alpha"]}, "both forced and muted"),
        ({"other": 1}, "meteora.other"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="meteora", messages=MESSAGES, extra_body={"meteora": body})
    with pytest.raises(openai.BadRequestError, match="does not choose adapters"):
        client.chat.completions.create(model="alpha", messages=MESSAGES, extra_body={"meteora": {"top_k": 1}})
    with pytest.raises(openai.BadRequestError, match="not a token id"):
        client.chat.completions.create(model="meteora", messages=MESSAGES, logit_bias={"999": 1})
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model="meteora", messages=[{"role": "user", "content": "x" * 9_000_000}])
    assert large.value.status_code == 413


def test_a_client_that_goes_away_frees_its_place(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.completions.create(model="meteora", prompt="ab", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert sum(server.service.scheduler.load) == 1
    stream.close()
    server.wait_until_idle(30)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="meteora", prompt=["ab"] * 8, max_tokens=450, extra_body={"ignore_eos": True})
    server.wait_until_idle(30)
    assert client.completions.create(model="meteora", prompt="ab", max_tokens=3).usage is not None
