"""`meteora serve` as a process: the address, the key, SIGTERM, and what is refused."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from meteora_cli.commands.serve import check_access, is_loopback, key_of, leave_out_of_collections, listen
from meteora_core.errors import UsageError
from support.chat_world import World, build_world
from support.server_process import serving


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def process(world: World, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with a key, and its address."""
    arguments = [str(world.checkpoint), "--port", "0", "--served-model-name", "mine", "--device", "cpu"]
    with serving(arguments, tmp_path, {**os.environ, "METEORA_API_KEY": "secret"}) as found:
        yield found


def test_collections_of_garbage_do_not_visit_what_the_server_loaded() -> None:
    loaded = [[number] for number in range(1000)]
    try:
        leave_out_of_collections()
        later = [0]
        tracked = {id(each) for each in gc.get_objects()}
        assert id(later) in tracked
        assert not any(id(each) in tracked for each in loaded)
    finally:
        gc.unfreeze()


def test_sigterm_lets_requests_finish(process: tuple[subprocess.Popen[str], str]) -> None:
    running, url = process
    headers = {"authorization": "Bearer secret"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
    body = {"model": "mine", "prompt": "ab", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert running.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_public_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METEORA_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert is_loopback(host)
        check_access(host, None, no_auth=False, changes=False)
    for host in ("0.0.0.0", "192.168.0.7", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="no key"):
            check_access(host, None, no_auth=False, changes=False)
        check_access(host, None, no_auth=True, changes=False)
        check_access(host, "secret", no_auth=False, changes=False)
    with pytest.raises(UsageError, match="exclude"):
        check_access("::", "secret", no_auth=True, changes=False)
    with pytest.raises(UsageError, match="needs a key"):
        check_access("127.0.0.1", None, no_auth=False, changes=True)
    assert key_of(None) is None
    monkeypatch.setenv("METEORA_API_KEY", "from-the-environment")
    assert (key_of(None), key_of("flag")) == ("from-the-environment", "flag")
    for key in ("two words", "ä", "line\n"):
        with pytest.raises(UsageError, match="ASCII"):
            key_of(key)


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1"):
        listen("127.0.0.1", taken.getsockname()[1]).close()
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_what_the_engine_vllm_needs_and_lacks(meteora, world: World) -> None:
    for flags, message, hint in (
        (("--engine", "vllm"), "vLLM is not installed", "--vllm-python"),
        (("--engine", "vllm", "--prefix-cache-mb", "3"), "--prefix-cache-mb has no effect here", "--engine transformers"),
        (("--vllm-args", "--foo"), "--vllm-args has no effect here", "--engine vllm"),
        (("--engine", "vllm", "--vllm-python", "/nowhere/python", "--vllm-args", "--port 3"), "`meteora serve` sets itself", "leave it out"),
        (("--engine", "other"), "not one of", "--help"),
    ):
        ran = meteora("serve", world.checkpoint, "--port", "0", *flags)
        assert ran.code == 2, ran.err
        assert message in ran.err
        assert hint in ran.err
