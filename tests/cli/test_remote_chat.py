"""`meteora chat --url` and `meteora trace --url` against real servers: that of this project, a plain one of OpenAI's API, and servers that fail."""

from __future__ import annotations

import http.server
import io
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from rich.console import Console

from meteora_cli.chat.repl import run_repl
from meteora_cli.chat.slash import Chat
from meteora_core.chat.remote_client import RemoteClient
from meteora_core.chat.remote_session import RemoteSession
from meteora_core.errors import MeteoraError, UsageError
from meteora_core.generation.requests import Finished, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import Access
from meteora_core.text import printable
from support.chat_world import NAMES, World, build_world, open_chat_model, without_ends
from support.server import RunningServer, running_server

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[RunningServer]:
    model = open_chat_model(world)
    without_ends(model.model)
    with running_server(model, AppOptions(Access((KEY,)))) as running:
        yield running


@pytest.fixture
def say(monkeypatch):
    """Sets what stands on stdin."""

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


@pytest.fixture(autouse=True)
def key(monkeypatch) -> None:
    monkeypatch.setenv("METEORA_API_KEY", KEY)


def session_with(server: RunningServer, **options: Any) -> RemoteSession:
    return RemoteSession(RemoteClient(server.url, KEY), Sampling(max_new_tokens=8), **options)


def finished(session: RemoteSession, message: str) -> Finished:
    return last(session.ask(message))


def last(events: Iterator[Any]) -> Finished:
    *_, event = events
    assert isinstance(event, Finished)
    return event


def test_the_answer_is_that_of_the_model_here_with_the_same_routes(meteora, server, say) -> None:
    from meteora_core.chat.session import ChatSession

    local = ChatSession(server.service.chat_model, Sampling(max_new_tokens=8), system="Be brief.")
    remote = session_with(server, system="Be brief.", top_k=1, routing_temperature=4.0)
    local.set("top-k", "1")
    local.set("T", "4")
    expected = server.service.scheduler.exclusively(lambda: last(local.ask("Hello")))
    found = finished(remote, "Hello")
    assert (found.text, found.ids, found.reason) == (expected.text, expected.ids, "length")
    assert found.prompt_tokens == expected.prompt_tokens
    picture = server.service.scheduler.exclusively(lambda: local.picture(last_turn=True))
    ours = remote.picture(last_turn=True)
    assert ours.paths == picture.paths
    assert (ours.shares() - picture.shares()[picture.rows("answer")]).abs().max() < 1e-3
    assert ours.speakers().tolist() == picture.speakers()[picture.rows("answer")].tolist()


def test_one_message_on_stdin(meteora, server, say) -> None:
    say(b"Hello\n")
    plain = meteora("chat", "--url", server.url, "--max-new-tokens", "9")
    assert plain.code == 0, plain.err
    say(b"Hello\n")
    document = meteora("chat", "--url", f"{server.url}/v1/", "--max-new-tokens", "9", "--json").json
    assert printable(document["text"], multiline=True) + "\n" == plain.out
    assert document["tokens"] == len(document["ids"]) == 9
    assert [token["role"] for token in document["routes"]["tokens"]] == ["answer"] * 9
    say(b"Hello\n")
    forced = meteora("chat", "--url", server.url, "--max-new-tokens", "5", "--json", "--adapter", "beta").json
    assert forced["mode"] == "forced: beta"
    assert {token["adapter"] for token in forced["routes"]["tokens"]} == {"beta"}
    say(b"Hello\n")
    base = meteora("chat", "--url", server.url, "--model", "base", "--max-new-tokens", "5", "--json").json
    assert "routes" not in base
    say(b"Hello\n")
    coloured = meteora("chat", "--url", server.url, "--route", "--max-new-tokens", "5")
    assert any(f"<{name}>" in coloured.out for name in NAMES)


def test_a_picture_of_an_answer(meteora, server, tmp_path) -> None:
    ran = meteora("trace", "--url", server.url, "--prompt", "Hello", "--max-new-tokens", "6", "--out", "answer.json")
    assert ran.code == 0, ran.err
    assert len(json.loads((tmp_path / "answer.json").read_text())["tokens"]) == 6


def consoles() -> Console:
    return Console(file=io.StringIO(), width=120, highlight=False, force_terminal=True, color_system="truecolor", no_color=False)


def feed(session: RemoteSession, *lines: str, route: bool = False) -> tuple[str, str]:
    """Run the loop over lines; what it printed on both consoles."""
    chat, waiting = Chat(session, consoles(), consoles(), route), iter(lines)

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    run_repl(chat, read)
    return chat.out.file.getvalue(), chat.notes.file.getvalue()


def test_the_commands_of_the_loop(server, tmp_path) -> None:
    talk, picture = tmp_path / "talk.jsonl", tmp_path / "talk.html"
    session = session_with(server)
    out, notes = feed(session, "/adapters", "/route on", "Hello", "/why", "/mute gamma", "/set T 3", "And now?", f"/export {picture}", f"/save {talk}")
    assert "the server" in out
    assert "48;2;" in out
    assert "8 written" in notes
    assert "tokens/s" in notes
    assert session.mode.describe() == "gates: top 2, T 3, without gamma"
    assert float(session.picture(last_turn=True).total()[NAMES.index("gamma")]) == 0
    assert picture.is_file()
    assert [json.loads(line)["prompt"] for line in talk.read_text().splitlines()] == ["Hello", "And now?"]
    other = session_with(server, top_k=2, routing_temperature=3.0)
    out, notes = feed(other, "/mute gamma", f"/load {talk}", "/why", "/compare beta What?", "/use beta", "Third", "/why", "/use auto", "/set temperature 3")
    assert "there is no answer yet" in notes
    assert "adapter beta" in out
    assert "MeteoRA" in out
    assert [turn.message for turn in other.turns] == ["Hello", "And now?", "Third"]
    assert other.picture(last_turn=True).speakers().tolist() == [NAMES.index("beta")] * 8
    assert "it must be a number from 0 to 2" in " ".join(notes.split())


def test_a_conversation_beyond_the_context_loses_its_oldest_turns(server) -> None:
    session = session_with(server)
    for number in range(3):
        finished(session, "x" * 140 + str(number))
    notices = [event.notice for event in session.ask("y" * 140) if hasattr(event, "notice")]
    assert notices == ["the conversation is too long: the oldest turn is left out"]
    with pytest.raises(UsageError, match="maximum context length"):
        finished(session, "z" * 600)
    assert len(session.turns) == 4


def test_ctrl_c_stops_the_answer_on_the_server(server) -> None:
    session = session_with(server)
    session.sampling = Sampling(max_new_tokens=450)
    seen = 0

    def stop() -> bool:
        return seen > 3

    for event in session.ask("Hello", stop=stop):
        seen += isinstance(event, Written)
        last = event
    assert isinstance(last, Finished)
    assert last.reason == "stopped"
    server.wait_until_idle(10)
    assert len(session.turns) == 1

    def press(number: int, frame: Any) -> None:
        raise AssertionError("the handler of the answer was not in place")

    before = signal.signal(signal.SIGINT, press)
    try:
        timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
        server.service.scheduler.exclusively(timer.start)
        _, notes = feed(session, "Again")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert " written" in notes


# --- other servers ---------------------------------------------------------------------------------------------------------------


@contextmanager
def plain_server(server: RunningServer) -> Iterator[str]:
    """The same server without Meteora's extensions: no paths under /v1/meteora, and no routes in its answers."""
    import httpx

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            self._forward(httpx.Request("GET", server.url + self.path, headers={"authorization": f"Bearer {KEY}"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert "meteora" not in body
            self._forward(httpx.Request("POST", server.url + self.path, headers={"authorization": f"Bearer {KEY}"}, json=body))

        def _forward(self, request: Any) -> None:
            if "/meteora" in self.path:
                self.send_error(404)
                return
            with httpx.Client(timeout=60) as client:
                answer = client.send(request)
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

    with served(Handler) as url:
        yield url


@contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def test_a_plain_server_answers_without_routes(meteora, server, say) -> None:
    with plain_server(server) as url:
        say(b"Hello")
        document = meteora("chat", "--url", url, "--max-new-tokens", "7", "--json").json
        assert document["model"] == f"meteora at {url}"
        assert document["tokens"] == 7
        assert document["text"] == finished(session_with(server), "Hello").text[:7] or len(document["text"]) >= 7
        assert "routes" not in document
        assert set(document["settings"]) == {"max-new-tokens", "temperature", "top-p", "seed"}
        say(b"Hello")
        refused = meteora("chat", "--url", url, "--route")
        assert refused.code == 2
        assert "has no adapters to choose from" in refused.err
        say(b"Hello")
        assert "has no adapters" in meteora("chat", "--url", url, "--adapter", "beta").err
        say(b"Hello")
        unknown = meteora("chat", "--url", url, "--model", "betta")
        assert "did you mean 'beta'?" in unknown.err


class Foreign(http.server.BaseHTTPRequestHandler):
    """A website."""

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        body = b"<html>\x1b[31mhello</html>"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_errors_are_one_line_with_a_hint(meteora, server, say, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"

    def refused(code: int, message: str, *arguments: str) -> None:
        say(b"Hello")
        ran = meteora("chat", *arguments)
        assert (ran.code, ran.out) == (code, ""), ran.err
        assert message in ran.err
        assert "hint:" in ran.err
        assert "Traceback" not in ran.err
        assert "\x1b" not in ran.err

    refused(1, f"cannot reach {closed}", "--url", closed)
    refused(2, "--url is not a usable address", "--url", "localhost:8000")
    refused(2, "--url contains a user name", "--url", "http://me:secret@localhost:8000")
    refused(2, "--checkpoint has no effect here", "--url", server.url, "--checkpoint", "runs/mine")
    refused(2, "--api-key has no effect here", "--api-key", "x")
    refused(2, "top-k cannot be 9", "--url", server.url, "--top-k", "9")
    refused(2, "no adapter named 'bta'", "--url", server.url, "--adapter", "bta")
    with served(Foreign) as url:
        refused(1, "does not answer as a server of OpenAI's API does", "--url", url)
    monkeypatch.setenv("METEORA_API_KEY", "wrong")
    refused(2, "refuses the key", "--url", server.url)
    monkeypatch.delenv("METEORA_API_KEY")
    refused(2, "needs a key", "--url", server.url)


def test_a_server_that_is_lost_in_an_answer_is_said_and_the_loop_goes_on() -> None:
    events = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
    endings = iter([b"", b"data: {broken\n\n", b'data: {"error": {"message": "out of memory"}}\n\n', b"data: [DONE]\n\n"])

    class Failing(Foreign):
        def do_GET(self) -> None:
            self._send(b'{"data": [{"id": "only"}]}' if self.path == "/v1/models" else b"{}")

        def do_POST(self) -> None:
            with suppress(OSError):
                self.rfile.read(int(self.headers["content-length"]))
                self._send(events + next(endings))

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    with served(Failing) as url:
        session = RemoteSession(RemoteClient(url))
        for message in ("the answer is incomplete", "does not answer as a server", "out of memory"):
            with pytest.raises(MeteoraError, match=message):
                list(session.ask("Hello"))
        assert session.turns == []
        assert [event.text for event in session.ask("Hello") if isinstance(event, Written)] == ["Hel"]
        assert len(session.turns) == 1
    with pytest.raises(MeteoraError, match="cannot reach"):
        list(session.ask("Hello"))
