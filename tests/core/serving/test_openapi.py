"""Requests that schemathesis makes from the server's own description: no crash, no hang, no answer that the description does not know."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
    described = httpx.get(f"{open_server.url}/openapi.json").json()["paths"]
    found = {(method, path.replace(":path", "")) for path, methods in described.items() for method in methods}
    assert found == {*OPERATIONS, ("get", "/ready"), ("get", "/version")}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_server(open_server: RunningServer, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{open_server.url}/openapi.json")
    operation = schema[path][method]
    valid, broken = operation.as_strategy(), operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    strategies = [valid, broken] if method == "post" else [valid]
    seen: set[int] = set()
    for strategy in strategies:

        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def send(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            seen.add(answer.status_code)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400 and method != "get":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        send()
    assert seen
    open_server.wait_until_idle(30)
    assert httpx.get(f"{open_server.url}/health").status_code == 200
