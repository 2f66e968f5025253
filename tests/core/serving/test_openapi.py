"""Requests that schemathesis makes from the server's own description: no crash, no hang, no answer that the description does not know."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import LOOPBACK, Access
from meteora_core.serving.service import ServiceOptions
from support.chat_world import World, open_chat_model
from support.server import RunningServer, running_server

EXAMPLES = int(os.environ.get("SERVE_FUZZ_REQUESTS", "25"))
"""Number of requests for each operation."""


@pytest.fixture(scope="module")
def open_server(world: World) -> Iterator[RunningServer]:
    with running_server(open_chat_model(world), AppOptions(Access(hosts=LOOPBACK)), ServiceOptions(max_new_tokens=4), max_model_len=64) as server:
        yield server


OPERATIONS = [
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("get", "/v1/meteora/adapters"),
    ("post", "/v1/meteora/adapters"),
    ("delete", "/v1/meteora/adapters/{name}"),
    ("get", "/health"),
    ("get", "/metrics"),
]


def test_the_operations_are_all_those_of_the_description(open_server: RunningServer) -> None:
    paths = described(open_server)["paths"]
    found = {(method, path.replace(":path", "")) for path, methods in paths.items() for method in methods}
    assert found == {*OPERATIONS, ("get", "/ready"), ("get", "/version")}


def described(server: RunningServer) -> dict[str, Any]:
    """The server's description, in which the names of models and adapters are those that exist, so that valid requests reach the model."""
    schema: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    models, adapters = ({"type": "string", "enum": [*names]} for names in (server.service.models, server.service.adapters))
    parts = schema["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        parts[name]["properties"]["model"] = models
    routing = parts["RoutingRequest"]["properties"]
    routing["mute"]["items"] = adapters
    routing["force"] = {"anyOf": [adapters, {"type": "null"}]}
    routing["weights"] = {
        "anyOf": [{"type": "object", "propertyNames": adapters, "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}, {"type": "null"}]
    }
    routing["top_k"] = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]}
    return schema


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_server(open_server: RunningServer, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_dict(described(open_server))
    operation = schema[path][method]
    valid, broken = operation.as_strategy(), operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    strategies = [valid, broken] if method == "post" else [valid]
    seen: Counter[int] = Counter()
    for strategy in strategies:

        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def send(case: schemathesis.Case) -> None:
            answer = case.call(base_url=open_server.url, timeout=60)
            seen[answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400 and method != "get":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        send()
    assert seen
    print(method, path, dict(seen))
    if method == "post" and path != "/v1/meteora/adapters":
        assert 200 in seen, "no request reached the model"
    open_server.wait_until_idle(30)
    assert httpx.get(f"{open_server.url}/health").status_code == 200
