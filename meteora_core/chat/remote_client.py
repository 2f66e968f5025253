"""A client for servers that have OpenAI's API, such as ``meteora serve``."""

from __future__ import annotations

import ipaddress
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.fetch.http import check_network_environment, problem_of_url, without_credentials
from meteora_core.text import one_line

CONNECT_SECONDS, SILENT_SECONDS = 15.0, 600.0
"""Time limits in seconds: for a connection, and for a pause without a byte from the server. ``meteora serve`` sends one at least every 15 seconds."""
_POLL_SECONDS = 0.05
_LONGEST_ERROR = 300
_WHICH = "give the address of `meteora serve`, or of another such server"


@dataclass(frozen=True)
class AdapterListing:
    """The adapters of a Meteora server.

    Attributes:
        model: Name of the model whose gates choose.
        base: Name of the base model.
        names: Names of the adapters.
        ranks: Rank of each adapter; None if the server does not report it.
        top_k: Number of adapters per token and layer, if the request sets none.
        temperature: Routing temperature, if the request sets none.
    """

    model: str
    base: str
    names: tuple[str, ...]
    ranks: tuple[int | None, ...]
    top_k: int
    temperature: float


class RemoteClient:
    """A client of one server.

    Args:
        url: Address of the server, such as ``http://127.0.0.1:8000``, with or without ``/v1`` at its end.
        key: Key of the server; None for none.

    Raises:
        UsageError: The address cannot be used.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        url = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
        if problem := problem_of_url(url, ("http", "https")):
            raise UsageError(f"--url is not a usable address: {problem}", hint="it should look like http://127.0.0.1:8000")
        self.url = without_credentials(url)
        if self.url != url:
            raise UsageError("--url contains a user name, a query or a fragment", hint="give the address alone, such as http://127.0.0.1:8000, and --api-key")
        local = _is_loopback(urlsplit(url).hostname or "")
        if not local:
            check_network_environment()
        self._local, self._key = local, key

    def _open(self) -> httpx.Client:
        """A client for one request. Proxies of the environment are not used for this machine."""
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return httpx.Client(headers=headers, timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS), trust_env=not self._local)

    # --- facts -------------------------------------------------------------------------------------------------------------------

    def models(self) -> tuple[str, ...]:
        """Names of the server's models.

        Raises:
            MeteoraError: The server cannot be reached, refuses the key, or does not have OpenAI's API.
        """
        listed = self._get("/v1/models")
        try:
            return tuple(str(model["id"]) for model in listed["data"])
        except (KeyError, TypeError):
            raise self._foreign() from None

    def adapters(self) -> AdapterListing | None:
        """The server's adapters; None if it is not a Meteora server, or serves a base model alone.

        Raises:
            MeteoraError: The server cannot be reached.
        """
        try:
            found = self._get("/v1/meteora/adapters")
            names = tuple(str(entry["name"]) for entry in found["data"])
            ranks = tuple(entry.get("rank") for entry in found["data"])
            listing = AdapterListing(str(found["model"]), str(found["base"]), names, ranks, int(found["top_k"]), float(found["T"]))
        except _Status:
            return None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return listing if names else None

    def _get(self, path: str) -> Any:
        try:
            with self._open() as client:
                answer = client.get(self.url + path, timeout=30.0)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self._gone(error) from error
        if answer.status_code != 200:
            raise self._refused(answer.status_code, answer.text)
        try:
            return answer.json()
        except ValueError:
            raise self._foreign() from None

    # --- answers -----------------------------------------------------------------------------------------------------------------

    def chat(self, body: Mapping[str, Any], stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
        """Ask for a chat answer, and yield the chunks of its stream as they arrive.

        Args:
            body: Body of the request, without ``stream``.
            stop: Function that is called several times a second; once it returns True, the stream is closed, and the server stops generating.

        Raises:
            UsageError: The server refuses the request.
            MeteoraError: The server cannot be reached, fails, or is lost in the middle of an answer.
        """
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        closing = threading.Event()
        responses: list[httpx.Response] = []
        reader = threading.Thread(target=self._read, args=(dict(body), arrived, closing, responses), name="meteora-answer", daemon=True)
        reader.start()
        try:
            while not stop():
                with suppress(queue.Empty):
                    item = arrived.get(timeout=_POLL_SECONDS)
                    if item is None:
                        return
                    if isinstance(item, MeteoraError):
                        raise item
                    yield item
        finally:
            closing.set()
            for response in responses:  # wakes the reader, which waits for bytes
                _shut(response)
            reader.join(1.0)

    def _read(self, body: dict[str, Any], arrived: queue.SimpleQueue[Any], closing: threading.Event, responses: list[httpx.Response]) -> None:
        """Put the chunks of a stream into ``arrived``, then None or an error."""
        ended = False
        try:
            request = {**body, "stream": True}
            with self._open() as client, client.stream("POST", f"{self.url}/v1/chat/completions", json=request) as answer:
                responses.append(answer)
                if answer.status_code != 200:
                    text = answer.read().decode("utf-8", "replace")
                    raise self._refused(answer.status_code, text)
                for line in answer.iter_lines():
                    if closing.is_set():
                        return
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        ended = True
                        break
                    chunk = json.loads(data)
                    if not isinstance(chunk, dict):
                        raise self._foreign()
                    if chunk.get("error"):
                        raise MeteoraError(f"the server failed: {_message_of(data)}")
                    arrived.put(chunk)
            arrived.put(None if ended else MeteoraError("the answer is incomplete: the connection to the server was lost", hint="ask again"))
        except MeteoraError as error:
            arrived.put(error)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            arrived.put(self._gone(error))
        except ValueError:
            arrived.put(self._foreign())

    # --- errors ------------------------------------------------------------------------------------------------------------------

    def _gone(self, error: Exception) -> MeteoraError:
        if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
            return MeteoraError(f"cannot reach {self.url}: {_reason(error)}", hint="start the server with `meteora serve`, or check the address")
        if isinstance(error, httpx.TimeoutException):
            return MeteoraError(f"{self.url} does not answer", hint="try again later")
        return MeteoraError(f"the connection to {self.url} was lost: {_reason(error)}", hint="check that the server still runs, and ask again")

    def _foreign(self) -> MeteoraError:
        return MeteoraError(
            f"{self.url} does not answer as a server of OpenAI's API does", hint="give the address of `meteora serve` or of another such server"
        )

    def _refused(self, status: int, text: str) -> MeteoraError:
        message = _message_of(text)
        if status == 401:
            return _Status(f"{self.url} {'needs a key' if self._key is None else 'refuses the key'}", hint='export METEORA_API_KEY="…", or add --api-key')
        if status in (429, 503):
            return MeteoraError(f"the server is busy: {message}", hint="try again later")
        if status == 404 and "error" not in text:
            return _Status(f"{self.url} has no OpenAI API (status 404)", hint=_WHICH)
        if 400 <= status < 500:
            return _Status(f"the server refuses the request: {message}")
        return MeteoraError(f"the server failed with status {status}: {message}", hint="the server's log may say more")


class _Status(UsageError):
    """The server refused a request with a status from 400 to 499."""


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _reason(error: Exception) -> str:
    return one_line(str(error), limit=_LONGEST_ERROR) or type(error).__name__


def _message_of(text: str) -> str:
    """The message of an error in OpenAI's format, or the beginning of any other body."""
    with suppress(ValueError, RecursionError):
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        found = error.get("message", error.get("detail")) if isinstance(error, dict) else error
        if isinstance(found, str) and found:
            return one_line(found, limit=_LONGEST_ERROR)
    return one_line(text, limit=_LONGEST_ERROR) or "no reason given"


def _shut(response: httpx.Response) -> None:
    """Close the socket of a response, from another thread than the one that reads it."""
    import socket

    stream = response.extensions.get("network_stream")
    found = None if stream is None else stream.get_extra_info("socket")
    if found is not None:
        with suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)
