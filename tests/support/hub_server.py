"""A hub on 127.0.0.1: model info, file tree, HEAD and GET with Range, and connections that break on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The repositories it has, what it was asked, and how it misbehaves.

    Attributes:
        repositories: Id -> path -> content.
        gated: Ids that nobody may read.
        private: Ids that are hidden without the token "secret".
        cuts: Path -> after how many bytes of an answer the connection breaks, once for each entry.
        failures: How many of the next requests for files are answered with 503.
        altered: Paths that arrive with a flipped byte.
        requests: (method, path, Range header) of everything that was asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        self.failures = 0
        self.altered: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, path: str) -> list[str | None]:
        """The Range headers of the GET requests for a file."""
        return [header for method, asked, header in self.requests if method == "GET" and asked.endswith("/" + path) and "/resolve/" in asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        repository, rest = "/".join(parts[:2]), parts[2:]
        files = self.server.repositories.get(repository)
        hidden = repository in self.server.private and self.headers.get("Authorization") != "Bearer secret"
        if files is None or hidden:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif repository in self.server.gated and not api:
            self.refuse(403, "GatedRepo", "Access to model is restricted")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound", "Revision not found")
        elif not rest or rest[0] == "revision":
            self.json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif rest[0] == "tree":
            self.json([self.entry(name, content) for name, content in files.items()])
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            self.file("/".join(rest[2:]), files["/".join(rest[2:])], body=body)
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def json(self, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, name: str, content: bytes, *, body: bool) -> None:
        if body and self.server.failures > 0:
            self.server.failures -= 1
            self.refuse(503, "", "Try again")
            return
        if name in self.server.altered and body:
            content = content[:-1] + bytes([content[-1] ^ 1])
        etag = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else hashlib.sha1(content).hexdigest()
        begin = 0
        asked = self.headers.get("Range")
        if asked:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
        part = content[begin:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            return
        cuts = self.server.cuts.get(name, [])
        if cuts:
            self.wfile.write(part[: cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
            return
        with suppress(OSError):
            self.wfile.write(part)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub for the length of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
