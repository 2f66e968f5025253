"""Keys, hosts, sizes and states of the server, by plain HTTP."""

from __future__ import annotations

import concurrent.futures

import httpx
import pytest

from meteora_core.chat.chat_model import ChatModel
from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import LOOPBACK, Access
from support.server import RunningServer, running_server


def get(server: RunningServer, path: str, **headers: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=headers, timeout=60)


def test_only_state_is_open_without_the_key(server: RunningServer) -> None:
    assert get(server, "/health").json() == {"status": "ok"}
    assert get(server, "/ready").status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/v1/meteora/adapters", "/nothing"):
        answer = get(server, path)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        for wrong in ("Bearer wrong", "Basic a-secret-key", "Bearer", "a-secret-key", "Bearer a-secret-key-longer", "Bearer \u00e4"):
            assert httpx.get(server.url + path, headers=[(b"authorization", wrong.encode("latin-1"))]).status_code == 401
    assert get(server, "/v1/models", authorization="Bearer a-secret-key").status_code == 200
    assert get(server, "/nothing", authorization="Bearer a-secret-key").status_code == 404
    assert get(server, "/version", authorization="Bearer a-secret-key").json()["bank_version"] == 0


def test_metrics_count_tokens_by_adapter(server: RunningServer) -> None:
    headers = {"authorization": "Bearer a-secret-key"}
    body = {"model": "beta", "prompt": "ab", "max_tokens": 5, "ignore_eos": True}
    before = metric(get(server, "/metrics", **headers).text, 'meteora_adapter_tokens_total{adapter="beta"}')
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    text = get(server, "/metrics", **headers).text
    assert metric(text, 'meteora_adapter_tokens_total{adapter="beta"}') == pytest.approx(before + 5, abs=0.01)
    for name in ("meteora_time_to_first_token_seconds_count", "meteora_generated_tokens_total", "meteora_key_value_bytes"):
        assert metric(text, name) > 0
    assert metric(text, 'meteora_requests_total{path="other",status="401"}') >= 0


def metric(text: str, name: str) -> float:
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)), 0.0)


def test_a_local_server_answers_only_under_loopback_names(fresh_model: ChatModel) -> None:
    with running_server(fresh_model, AppOptions(Access(hosts=LOOPBACK, max_body=2000), cors=("https://example.org",))) as server:
        assert get(server, "/v1/models").status_code == 200
        assert get(server, "/v1/models", host="localhost:1").status_code == 200
        assert get(server, "/v1/models", host="evil.example:80").status_code == 403
        assert "access-control-allow-origin" in get(server, "/health", origin="https://example.org").headers
        assert "access-control-allow-origin" not in get(server, "/health", origin="https://other.org").headers
        large = httpx.post(f"{server.url}/v1/completions", content=(b" " * 500 for _ in range(10)), headers={"content-type": "application/json"})
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        for content in (b"{", b"[" * 1000, b'"\xff"', b"[1]", b'{"model": 1}'):
            broken = httpx.post(f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"})
            assert broken.status_code == 400, content
            assert broken.json()["error"]["type"] == "invalid_request_error"
        assert httpx.get(f"{server.url}/v1/completions").status_code == 405
        assert httpx.delete(f"{server.url}/v1/meteora/adapters/alpha").status_code == 403


def test_a_full_queue_is_refused_and_the_rest_is_answered(fresh_model: ChatModel) -> None:
    body = {"model": "meteora", "prompt": "abc", "max_tokens": 60, "ignore_eos": True}
    with running_server(fresh_model, max_batch=2, max_queue=3) as server, concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{server.url}/v1/completions", json=body, timeout=120), range(24)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        server.wait_until_idle()
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
