"""Random load on a server: ``python -m tests.robustness.load --seconds 3600``.

Clients request greedy answers whose text is known, whole or as streams, and check each of them. Other clients disconnect during a request or its answer, read
slowly, send malformed bodies, or are so many that the queue is full. Between these phases, the server is idle for a moment, and its memory, threads and open
files are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

KEY = "the-key-of-the-load"
LOST, PAUSE = 300.0, 5.0
"""Seconds without a token after which the answers of a busy server are taken for lost, and seconds between two looks at it."""
LENGTH = 24
"""Number of tokens in the longest requested answer."""
MARGIN = 1e-3
"""Least distance between the two largest logits of a known answer: closer ones are not used, because the order of a sum may decide between them."""
KNOWN_REFUSALS = frozenset({400, 401, 403, 404, 405, 413, 422, 431})


@dataclass(frozen=True)
class Known:
    """A request of text completion, and its greedy answer.

    Attributes:
        model: Name of the model.
        prompt: Token ids of the prompt.
        meteora: The field `meteora`; None for none.
        tokens: Token ids of the answer.
    """

    model: str
    prompt: list[int]
    meteora: dict[str, Any] | None
    tokens: list[int]

    def body(self, count: int, **fields: Any) -> dict[str, Any]:
        """The request for the first ``count`` tokens of the answer."""
        body = {"model": self.model, "prompt": self.prompt, "temperature": 0, "max_tokens": count, "ignore_eos": True, **fields}
        return {**body, "meteora": {**self.meteora, **body.get("meteora", {})}} if self.meteora is not None else body


def known_answers(model: Any, count: int, draw: random.Random) -> list[Known]:
    """Requests of every kind with their answers, each computed by a pass over the whole text for every token, without a cache."""
    from meteora_core.routing import RoutingOptions
    from support.serving import alone

    names, state, found = model.meteora.names, model.meteora, []
    while len(found) < count:
        prompt = [draw.randrange(3, 259) for _ in range(draw.choice([1, 3, 9, 30, 90]))]
        if found and draw.random() < 0.4:  # a prefix that another request has, too
            prompt = [*draw.choice(found).prompt, *prompt][:200]
        top_k, temperature, name = draw.randint(1, len(names)), draw.choice([0.5, 1.0, 15.0]), draw.choice(names)
        kind = draw.randrange(6)
        chosen: tuple[str, dict[str, Any] | None, RoutingOptions] = [
            ("meteora", None, RoutingOptions(state.top_k, state.temperature)),
            ("meteora", {"top_k": top_k, "T": temperature}, RoutingOptions(top_k, temperature)),
            ("meteora", {"mute": [name]}, RoutingOptions(state.top_k, state.temperature, muted=frozenset([name]))),
            ("meteora", {"weights": {name: 0.5, names[0]: 0.75}}, RoutingOptions(weights={name: 0.5, names[0]: 0.75})),
            ("base", None, RoutingOptions(enabled=False)),
            (name, None, RoutingOptions(state.top_k, state.temperature, forced=name)),
        ][kind]
        with _margins(model) as margins:
            tokens = alone(model, prompt, chosen[2], LENGTH)
        if min(margins) > MARGIN:
            found.append(Known(chosen[0], prompt, chosen[1], tokens))
    return found


def text_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """A function that turns the tokens of an answer into its text."""
    from meteora_core.generation.text import TextDecoder

    def text(tokens: Sequence[int]) -> str:
        decoder = TextDecoder(tokenizer)
        return "".join(decoder.add(token) for token in tokens) + decoder.flush()

    return text


@contextmanager
def _margins(model: Any) -> Iterator[list[float]]:
    """Collects the distances between the two largest logits of the last position of every pass."""
    found: list[float] = []

    def note(module: Any, arguments: Any, output: Any) -> None:
        first, second = output[0, -1].topk(2).values.tolist()
        found.append(first - second)

    handle = model.lm_head.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@dataclass
class Load:
    """The clients of one server.

    Attributes:
        url: Address of the server.
        known: Requests with their answers.
        text: Function that turns the tokens of an answer into its text.
        draw: Source of all choices.
        key: Key of the server.
        counts: Number of requests of each kind and result.
        faults: Descriptions of faults.
    """

    url: str
    known: Sequence[Known]
    text: Callable[[Sequence[int]], str]
    draw: random.Random
    key: str = KEY
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, clients: int, more: Callable[[], bool]) -> None:
        """Send requests by so many clients at once while ``more()``, and wait for the last answers. Those that an idle server still owes are lost."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=None, limits=limits) as client:
            pending = {asyncio.ensure_future(self._client(client, more)) for _ in range(clients)}
            last, since = "", time.monotonic()
            while pending:
                done, pending = await asyncio.wait(pending, timeout=PAUSE)
                for task in done:
                    task.result()
                state = await self._state(client)
                if done or more() or state != last:
                    last, since = state, time.monotonic()
                elif time.monotonic() - since > (LOST if _busy(state) else 2 * PAUSE):
                    self.faults.append(f"lost: {len(pending)} clients still wait, and nothing happens in the server")
                    for task in pending:
                        task.cancel()
                    await asyncio.gather(*pending, return_exceptions=True)
                    return

    async def _state(self, client: httpx.AsyncClient) -> str:
        """The server's counters of tokens and requests."""
        text = (await client.get("/metrics", timeout=LOST)).text
        names = ("meteora_requests_running ", "meteora_requests_waiting ", "meteora_prompt_tokens_total ", "meteora_generated_tokens_total ")
        return "\n".join(line for line in text.splitlines() if line.startswith(names))

    async def _client(self, client: httpx.AsyncClient, more: Callable[[], bool]) -> None:
        kinds: list[tuple[int, str, Callable[[httpx.AsyncClient], Awaitable[str]]]] = [
            (20, "whole", self._whole),
            (20, "stream", self._stream),
            (6, "several prompts", self._several),
            (6, "chat", self._chat),
            (14, "vanished", self._vanish),
            (12, "malformed", self._malformed),
            (3, "slow reader", self._slow),
            (3, "metrics", self._metrics),
            (1, "burst", self._burst),
        ]
        while more():
            _, kind, send = self.draw.choices(kinds, [entry[0] for entry in kinds])[0]
            try:
                result = await send(client)
            except (httpx.HTTPError, OSError, ValueError, KeyError, IndexError) as error:
                self.faults.append(f"{kind}: {type(error).__name__}: {error}")
                result = "failed"
            self.counts[f"{kind}: {result}"] += 1

    # --- requests whose answer is known ------------------------------------------------------------------------------------------

    def _request(self) -> tuple[Known, int]:
        return self.draw.choice(self.known), self.draw.randint(1, LENGTH)

    def _checked(self, known: Known, count: int, text: str, tokens: int) -> str:
        expected = self.text(known.tokens[:count])
        if (text, tokens) == (expected, count):
            return "right"
        others = [other for other in self.known if self.text(other.tokens[:count]) == text]
        kind = "crossed" if others else "wrong"
        self.faults.append(f"{kind}: {known.model} {known.meteora} {known.prompt[:9]}: {text!r} of {tokens} tokens, not {expected!r} of {count}")
        return "wrong"

    def _refused(self, answer: httpx.Response, *statuses: int) -> str:
        if answer.status_code not in statuses:
            self.faults.append(f"status {answer.status_code}: {answer.text[:300]}")
        elif answer.status_code != 431 and "error" not in answer.json():
            self.faults.append(f"an error without its body: {answer.text[:300]}")
        return str(answer.status_code)

    async def _whole(self, client: httpx.AsyncClient) -> str:
        known, count = self._request()
        answer = await client.post("/v1/completions", json=known.body(count))
        if answer.status_code != 200:
            return self._refused(answer, 503)
        body = answer.json()
        return self._checked(known, count, body["choices"][0]["text"], body["usage"]["completion_tokens"])

    async def _stream(self, client: httpx.AsyncClient, pause: float = 0.0) -> str:
        known, count = self._request()
        routes = known.model == "meteora" and self.draw.random() < 0.4
        fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        if routes:
            fields["meteora"] = {**(known.meteora or {}), "routes": self.draw.choice(["mean", "layers"])}
        text, tokens, routed, ended = "", 0, 0, False
        async with client.stream("POST", "/v1/completions", json=known.body(count) | fields) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._refused(answer, 503)
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("error"):
                    raise ValueError(f"an error in a stream: {chunk}")
                for choice in chunk["choices"]:
                    text += choice["text"]
                    routed += len(choice.get("meteora", {}).get("tokens", ()))
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                if pause:
                    await asyncio.sleep(pause)
        if not ended:
            raise ValueError("a stream without an end")
        if routes and routed != count:
            raise ValueError(f"routes of {routed} tokens, not of {count}")
        return self._checked(known, count, text, tokens)

    async def _slow(self, client: httpx.AsyncClient) -> str:
        return await self._stream(client, 0.2)

    async def _several(self, client: httpx.AsyncClient) -> str:
        first, count = self._request()
        alike = [other for other in self.known if (other.model, other.meteora) == (first.model, first.meteora)]
        chosen = self.draw.choices(alike, k=self.draw.randint(2, 4))
        answer = await client.post("/v1/completions", json=first.body(count) | {"prompt": [known.prompt for known in chosen], "logprobs": 0})
        if answer.status_code != 200:
            return self._refused(answer, 503)
        choices = answer.json()["choices"]
        results = {self._checked(known, count, choice["text"], len(choice["logprobs"]["tokens"])) for known, choice in zip(chosen, choices, strict=True)}
        return "right" if results == {"right"} else "wrong"

    async def _chat(self, client: httpx.AsyncClient) -> str:
        """A sampled chat, twice with one seed."""
        body = {"model": "meteora", "messages": [{"role": "user", "content": f"Message {self.draw.randrange(50)}"}], "max_tokens": 8, "seed": 5, "n": 2}
        texts = []
        for _ in range(2):
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                return self._refused(answer, 503)
            texts.append([choice["message"]["content"] for choice in answer.json()["choices"]])
        if texts[0] != texts[1]:
            self.faults.append(f"two answers with one seed: {texts}")
        return "right" if texts[0] == texts[1] else "wrong"

    async def _burst(self, client: httpx.AsyncClient) -> str:
        results = await asyncio.gather(*(self._whole(client) for _ in range(48)))
        for result in results:
            self.counts[f"in a burst: {result}"] += 1
        return "sent"

    async def _metrics(self, client: httpx.AsyncClient) -> str:
        answer = await client.get(self.draw.choice(["/metrics", "/health", "/v1/models", "/version", "/", "/v1/meteora/adapters"]))
        return "right" if answer.status_code == 200 else self._refused(answer)

    # --- clients that vanish, and malformed bodies -------------------------------------------------------------------------------

    async def _vanish(self, client: httpx.AsyncClient) -> str:
        """Send a request, or the beginning of one, and close the connection at a random point."""
        known, _ = self._request()
        stream = self.draw.random() < 0.7
        body = json.dumps(known.body(400, stream=stream)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        point = self.draw.choice(["head", "body", "answer", "stream", "stream"])
        reader, writer = await asyncio.open_connection(self._address[0], self._address[1])
        try:
            if point == "head":
                writer.write(sent[: self.draw.randrange(1, len(sent) - len(body))])
            else:
                writer.write(sent[: len(sent) - self.draw.randrange(1, len(body))] if point == "body" else sent)
            await writer.drain()
            if point == "stream":
                await reader.read(self.draw.choice([1, 100, 3000]))
            await asyncio.sleep(self.draw.choice([0, 0.01, 0.1, 0.5]))
        finally:
            if self.draw.random() < 0.5:  # close with a reset instead of an orderly end
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        return f"in the {point}"

    @property
    def _address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    async def _malformed(self, client: httpx.AsyncClient) -> str:
        known, count = self._request()
        good = json.dumps(known.body(count))
        path, headers = self.draw.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses"]), {"content-type": "application/json"}
        kind = self.draw.choice(["cut", "bytes", "flipped", "deep", "large", "key", "field", "value", "model", "long", "adapter", "path", "http"])
        if kind == "http":
            return await self._garbage()
        content: bytes = good.encode()
        if kind == "cut":
            content = content[: self.draw.randrange(len(content))]
        elif kind == "bytes":
            content = self.draw.randbytes(self.draw.choice([0, 1, 50, 5000]))
        elif kind == "flipped":
            at = self.draw.randrange(len(content))
            content = content[:at] + bytes([content[at] ^ self.draw.choice([1, 4, 0x80])]) + content[at + 1 :]
            path = "/v1/chat/completions"  # which refuses a body that became valid again
        elif kind == "deep":
            content = b"[" * 100_000
        elif kind == "large":
            content = b" " * (9 << 20)
        elif kind == "key":
            headers["authorization"] = self.draw.choice(["Bearer nothing", "Basic x", "", "Bearer " + "x" * 5000])
        elif kind == "field":
            content = json.dumps(known.body(count, **{self.draw.choice(["x", "best_of", "messages2", "\0"]): 3})).encode()
        elif kind == "value":
            name = self.draw.choice(["prompt", "max_tokens", "temperature", "model", "stop", "logit_bias", "n"])
            content = json.dumps(known.body(count) | {name: self.draw.choice([-1, 10**30, "\ud800", [[[]]], {"a": 1}, float("nan")])}).encode()
            path = "/v1/responses"
        elif kind == "model":
            content, path = json.dumps({**known.body(count), "model": "nobody"}).encode(), "/v1/completions"
        elif kind == "long":
            content, path = json.dumps(known.body(count) | {"prompt": [5] * 5000}).encode(), "/v1/completions"
        elif kind == "adapter":
            content, path = json.dumps(known.body(count) | {"model": "meteora", "meteora": {"force": "nobody"}}).encode(), "/v1/completions"
        elif kind == "path":
            path = self.draw.choice(["/v1/nothing", "/v1/models/%00", "/v1/models/..%2f..", "/" + "a" * 3000])
        answer = await client.post(path, content=content, headers=headers)
        return f"{kind} {self._refused(answer, 503, *KNOWN_REFUSALS)}"

    async def _garbage(self) -> str:
        """Send bytes that are not HTTP. The server closes the connection."""
        length = b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"
        texts = [b"\0\1\2\3\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", length, b"\x16\x03\x01\x02\x00\x01"]
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(self.draw.choice(texts) + self.draw.randbytes(20))
        with suppress(OSError):
            await writer.drain()
            writer.write_eof()
            await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return "http closed"


# --- the server --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle:
    """Resources of the idle server.

    Attributes:
        seconds: Time since the start.
        rss: Memory in MB.
        files: Number of open files.
        threads: Number of threads.
    """

    seconds: float
    rss: float
    files: int
    threads: int


def measured(pid: int, began: float) -> Idle:
    """The memory, files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss = int(status["VmRSS"].split()[0]) / 1024
    return Idle(round(time.monotonic() - began, 1), round(rss, 1), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"]))


def _busy(text: str) -> list[str]:
    """The lines of metrics that tell of requests in progress or waiting."""
    return [line for line in text.splitlines() if line.startswith(("meteora_requests_running ", "meteora_requests_waiting ")) and not line.endswith(" 0.0")]


def wait_until_idle(url: str, key: str, seconds: float = LOST) -> str | None:
    """Wait until no request is in progress or waiting. Returns what is left after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        busy = _busy(httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=seconds).text)
        if not busy:
            return None
        if time.monotonic() > end:
            return f"requests are left over: {', '.join(busy)}"
        time.sleep(0.1)


def growth(points: Sequence[Idle]) -> float:
    """Growth of the memory in MB per hour: the slope of a line through all measurements but those of the first fifth, in which caches fill."""
    rest = [point for point in points if point.seconds >= points[-1].seconds / 5]
    if len(rest) < 3:
        return 0.0
    mean_x, mean_y = (sum(values) / len(rest) for values in ([point.seconds for point in rest], [point.rss for point in rest]))
    spread = sum((point.seconds - mean_x) ** 2 for point in rest)
    return 3600 * sum((point.seconds - mean_x) * (point.rss - mean_y) for point in rest) / spread


def main() -> int:
    """Run the campaign. Returns the exit code, which is 1 if there were faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default: 3600)")
    parser.add_argument("--round", type=float, default=60, help="seconds of load between two measurements (default: 60)")
    parser.add_argument("--clients", type=int, default=12, help="clients at once (default: 12)")
    parser.add_argument("--seed", type=int, default=1, help="of all choices (default: 1)")
    parser.add_argument("--growth", type=float, default=8, help="largest growth of the memory in MB per hour (default: 8)")
    parser.add_argument("--report", type=Path, help="write counts, measurements and faults there, as JSON")
    options = parser.parse_args()
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    from meteora_core import load_checkpoint
    from support.chat_world import build_world, byte_tokenizer

    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        world = build_world(Path(folder))
        known = known_answers(load_checkpoint(world.checkpoint), 200, draw)
        process, url = start_server(world.checkpoint, Path(folder))
        began, points = time.monotonic(), []
        load = Load(url, known, text_of(byte_tokenizer()), draw)
        try:
            while time.monotonic() - began < options.seconds and process.poll() is None and len(load.faults) < 100:
                end = min(time.monotonic() + options.round, began + options.seconds)
                asyncio.run(load.run(options.clients, lambda end=end: time.monotonic() < end))  # type: ignore[misc]
                left = wait_until_idle(url, KEY)
                if left:
                    load.faults.append(left)
                points.append(measured(process.pid, began))
                total = sum(load.counts.values())
                print(f"{points[-1].seconds:6.0f} s  {total:8,} requests  {len(load.faults)} faults  {points[-1]}", flush=True)
                write_report(options, load, points)
        finally:
            alive = process.poll() is None
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    if not alive or code:
        load.faults.append(f"the server ended with code {code}")
    grown = growth(points)
    if grown > options.growth:
        load.faults.append(f"the memory grows by {grown:.1f} MB an hour")
    if points and points[-1].files > points[0].files + 8:
        load.faults.append(f"open files: {points[0].files} at first, {points[-1].files} at last")
    write_report(options, load, points)
    for name, count in sorted(load.counts.items()):
        print(f"{count:9,}  {name}")
    print(f"memory: {grown:+.2f} MB an hour; {len(load.faults)} faults")
    for fault in load.faults[:20]:
        print(f"  {fault}")
    return int(bool(load.faults))


def write_report(options: argparse.Namespace, load: Load, points: Sequence[Idle]) -> None:
    """Write what is known so far, if a file was named."""
    if options.report:
        report = {"seed": options.seed, "counts": dict(sorted(load.counts.items())), "idle": [vars(point) for point in points], "faults": load.faults}
        options.report.write_text(json.dumps({**report, "growth_mb_per_hour": round(growth(points), 2) if points else None}, indent=1))


def start_server(checkpoint: Path, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`meteora serve` on a checkpoint, as a process, and its address."""
    flags = ["--port", "0", "--max-batch", "8", "--max-queue", "24", "--prefix-cache-mb", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "meteora_cli", "serve", str(checkpoint), *flags]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "METEORA_API_KEY": KEY}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Serving on "):
            threading.Thread(target=lambda: [print(f"server: {line}", end="") for line in process.stderr or ()], daemon=True).start()
            return process, line.split()[2]
        print(line, end="")
    raise SystemExit("the server does not start")


if __name__ == "__main__":
    sys.exit(main())
