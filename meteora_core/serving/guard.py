"""Checks every request before it reaches the application: its key, its host and its size."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meteora_core.serving.failures import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
"""Paths that need no key; they reveal nothing about the model."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        keys: Keys of which a request must have one; empty if no key is needed.
        hosts: Values of the header `Host`, without the port, that are accepted; empty for all. Without a key, a server on a loopback address accepts
            only loopback names, so that no website can reach it through a name of its own.
        max_body: Maximum size of a request's body in bytes.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 8 << 20

    def allows(self, authorization: str) -> bool:
        """Whether a header `Authorization` has one of the keys. The time does not depend on where a wrong key differs."""
        scheme, _, given = authorization.partition(" ")
        found = False
        for key in self.keys:
            found |= hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
        return not self.keys or (found and scheme.lower() == "bearer")


class Guard:
    """An ASGI application around another one.

    Args:
        app: The application.
        access: Who may use it.
        count: Function that receives the path and the status of every answer.
        paths: Paths to report as they are; others are reported as "other".
    """

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str, int], None], paths: Sequence[str]) -> None:
        self.app, self.access, self.count, self.paths = app, access, count, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(path if path in self.paths else "other", message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope, headers)
        if problem is not None:
            await refuse(counted, problem)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.access.max_body:
                    raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, limited, counted)

    def _problem(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        access = self.access
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if access.hosts and name not in access.hosts:
            return ApiError(403, "this server answers only under its own address", hint="use http://127.0.0.1 or http://localhost, or start it with --api-key")
        if scope["path"] not in OPEN_PATHS and not access.allows(headers.get("authorization", "")):
            message = "Incorrect API key provided" if headers.get("authorization") else "You didn't provide an API key"
            return ApiError(401, message, hint="send it as the header Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:18]) > access.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.access.max_body:,} bytes", code="request_too_large")


async def refuse(send: Send, error: ApiError) -> None:
    """Send an error as the whole answer."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
