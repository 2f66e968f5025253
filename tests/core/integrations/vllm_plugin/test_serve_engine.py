"""``meteora serve --engine vllm``: the protocol of the embedded engine, answered by vLLM. ``make test-vllm`` runs this."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from meteora_core.serving.protocol import ChatMessage, RoutingRequest
from meteora_core.serving.service import Service, ServiceOptions
from support import chat_world
from support.chat_world import NAMES, World, build_world, byte_llama, open_chat_model
from support.server_process import serving
from support.serving import alone
from support.vllm_environment import PYTHON, environment, needs_vllm

pytestmark = [pytest.mark.slow, needs_vllm]

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:  # vLLM's attention on a CPU needs heads of at least 32 dimensions
        patch.setattr(chat_world, "byte_llama", partial(byte_llama, hidden_size=128, intermediate_size=96))
        yield build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    folder = tmp_path_factory.mktemp("run")
    flags = ["--engine", "vllm", "--vllm-python", PYTHON, "--vllm-args", "--enforce-eager", "--dtype", "float32", "--max-batch", "8", "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    variables = {**environment(), **kept, "METEORA_API_KEY": KEY, "METEORA_CACHE": str(folder / "cache")}
    with serving([str(world.checkpoint), *flags], folder, variables) as (running, url):
        yield running, url
        running.send_signal(signal.SIGTERM)  # vLLM's own process has to end, too
        running.wait(60)


def test_answers_routes_and_errors_are_those_of_the_embedded_engine(world: World, server: tuple[subprocess.Popen[str], str]) -> None:
    running, url = server
    model = open_chat_model(world)
    service = Service(model, None, ServiceOptions())  # type: ignore[arg-type]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        assert [entry.id for entry in client.models.list()] == ["meteora", "base", *NAMES]
        asked: list[tuple[str, dict[str, Any]]] = [
            ("meteora", {}),
            ("meteora", {"top_k": 1, "T": 4.0}),
            ("meteora", {"mute": ["beta"]}),
            ("gamma", {}),
            ("base", {}),
        ]
        for name, options in asked:
            routing = service.routing(name, RoutingRequest(**options))
            ids = service.prompts.chat([ChatMessage(role="user", content="Say something.")], [], routing)
            expected = alone(model.model, ids, routing, 10)
            body: dict[str, Any] = {"ignore_eos": True, "meteora": {**options, "routes": "layers"}}
            fields: Any = {"model": name, "messages": [{"role": "user", "content": "Say something."}], "temperature": 0, "max_tokens": 10, "extra_body": body}
            whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
            tokens = whole.choices[0].meteora["tokens"] if name != "base" else []  # type: ignore[attr-defined]
            assert [token["id"] for token in tokens] == (expected if name != "base" else [])
            chunks = list(client.chat.completions.create(**fields, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == whole.choices[0].message.content
            assert text.startswith("".join(token["text"] for token in tokens))
            assert whole.choices[0].logprobs is not None
            assert [len(entry.top_logprobs) for entry in whole.choices[0].logprobs.content or ()] == [2] * 10
            if name == "gamma":
                assert [token["weights"] for token in tokens] == [{"gamma": 1.0}] * 10
            if options.get("mute"):
                assert all("beta" not in layer for token in tokens for layer in token["layers"])
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        shaped = client.chat.completions.create(model="meteora", messages=[{"role": "user", "content": "n?"}], response_format=form, max_tokens=40)
        assert json.loads(shaped.choices[0].message.content or "") in ({"n": 1}, {"n": 2})
        cut = client.completions.create(model="meteora", prompt="ab", max_tokens=30, temperature=0, logit_bias={"70": 100}, stop=["ddd"])
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("", "stop")
        for fields, message in (({"weights": {"alpha": 1.0}}, "fixed weights"), ({"top_k": 9}, "top_k"), ({"force": "nobody"}, "nobody")):
            with pytest.raises(openai.BadRequestError, match=message):
                client.completions.create(model="meteora", prompt="ab", extra_body={"meteora": fields})
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "meteora", "prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True},
                      headers={"authorization": f"Bearer {KEY}"}, timeout=60) as stream:  # fmt: skip
        next(stream.iter_lines())
    metrics = ""
    for _ in range(100):
        metrics = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
        if "vllm:num_requests_running{" in metrics and running_in(metrics) == 0:
            break
    assert running_in(metrics) == 0
    assert "meteora_generated_tokens_total" in metrics
    assert running.poll() is None


def running_in(metrics: str) -> float:
    return max(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{"))


def test_a_server_whose_vllm_has_ended_says_so_and_leaves(server: tuple[subprocess.Popen[str], str]) -> None:
    running, url = server
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    engines = [child for child in children if b"vllm.entrypoints" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(engines) == 1
    os.kill(int(engines[0]), signal.SIGKILL)
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(100):
        if httpx.get(f"{url}/health").status_code == 503:
            break
    assert httpx.get(f"{url}/health").status_code == 503
    refused = httpx.post(f"{url}/v1/completions", json={"model": "meteora", "prompt": "a"}, headers=headers, timeout=60)
    assert refused.status_code == 500
    assert "vLLM has ended" in refused.json()["error"]["message"]
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
