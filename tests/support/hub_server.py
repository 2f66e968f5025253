"""A hub on 127.0.0.1: model info, file tree, HEAD and GET with Range, uploads by commits and LFS, and failures on request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The repositories it has, what it was asked, and how it misbehaves.

    Attributes:
        repositories: Id -> path -> content.
        gated: Ids that nobody may read.
        private: Ids that are hidden without the token "secret".
        owner: The user whose token "secret" is; it may write to its own repositories only.
        heads: Id -> the commit of its main branch, for repositories that were written to; others have :data:`COMMIT`.
        history: (id, commit) -> path -> content.
        refusals: Part of a path -> the statuses of the next answers to it.
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
        self.owner = "someone"
        self.heads: dict[str, str] = {}
        self.history: dict[tuple[str, str], dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.refusals: dict[str, list[int]] = {}
        self.lock = threading.Lock()

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Write files to the main branch. Returns the commit."""
        before = self.repositories.get(repository, {})
        self.history.setdefault((repository, self.head(repository)), dict(before))
        after = {**before, **files}
        content = "".join(f"{name}{hashlib.sha1(each).hexdigest()}" for name, each in sorted(after.items()))
        commit = hashlib.sha1((self.head(repository) + content).encode()).hexdigest()
        self.repositories[repository], self.heads[repository], self.history[repository, commit] = after, commit, after
        return commit

    def head(self, repository: str) -> str:
        """The commit of the main branch."""
        return self.heads.get(repository, COMMIT)

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

    def do_POST(self) -> None:
        self.write_to_hub()

    def do_PUT(self) -> None:
        self.write_to_hub()

    def body(self) -> bytes:
        """The body of a request, also in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refused(self, path: str) -> bool:
        """Whether this answer is one of the wanted refusals, which is sent then."""
        for part, statuses in self.server.refusals.items():
            if part in path and statuses:
                self.refuse(statuses.pop(0), "", "Refused on request")
                return True
        return False

    def write_to_hub(self) -> None:
        path, raw, hub = unquote(urlsplit(self.path).path), self.body(), self.server
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        if self.refused(path):
            return
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            hub.stored[parts[1]] = raw
            assert hashlib.sha256(raw).hexdigest() == parts[1]
            self.json({})
        elif self.headers.get("Authorization") != "Bearer secret":
            self.refuse(401, "", "Invalid username or password.")
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(raw)
            repository = f"{asked.get('organization') or hub.owner}/{asked['name']}"
            if not repository.startswith(f"{hub.owner}/"):
                self.refuse(403, "", "You may not create a repository there")
                return
            hub.repositories.setdefault(repository, {})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(repository)
            self.json({"url": f"{hub.endpoint}/{repository}", "name": repository})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [{"oid": each["oid"], "size": each["size"]} for each in json.loads(raw)["objects"]]
            for each in objects:
                if each["oid"] not in hub.stored:
                    each["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}
            self.json({"transfer": "basic", "objects": objects})
        elif parts[:2] == ["api", "models"] and parts[4:5] in (["preupload"], ["commit"]):
            repository = "/".join(parts[2:4])
            if repository not in hub.repositories:
                self.refuse(404, "RepoNotFound", "Repository not found")
            elif not repository.startswith(f"{hub.owner}/"):
                self.refuse(403, "", "You may not write there")
            elif parts[4] == "preupload":
                modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in json.loads(raw)["files"]]
                self.json({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]})
            else:
                self.receive(repository, [json.loads(line) for line in raw.splitlines() if line.strip()])
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    def receive(self, repository: str, lines: list[dict[str, object]]) -> None:
        """Make a commit of the lines of its description."""
        files: dict[str, bytes] = {}
        for line in lines:
            value: dict[str, str] = line["value"]  # type: ignore[assignment]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        with self.server.lock:
            commit = self.server.commit(repository, files)
        self.json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repository}/commit/{commit}"})

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.refused(path):
            return
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
        elif len(rest) > 1 and rest[1] not in ("main", self.server.head(repository)) and (repository, rest[1]) not in self.server.history:
            self.refuse(404, "RevisionNotFound", "Revision not found")
        elif not rest or rest[0] == "revision":
            at, files = self.at(repository, rest[1:])
            private = repository in self.server.private
            self.json({"id": repository, "sha": at, "private": private, "siblings": [{"rfilename": name} for name in files]})
        elif rest[0] == "tree":
            self.json([self.entry(name, content) for name, content in self.at(repository, rest[1:])[1].items()])
        elif rest[0] == "resolve" and "/".join(rest[2:]) in self.at(repository, rest[1:])[1]:
            at, files = self.at(repository, rest[1:])
            self.file("/".join(rest[2:]), files["/".join(rest[2:])], body=body, commit=at)
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    def at(self, repository: str, rest: list[str]) -> tuple[str, dict[str, bytes]]:
        """The commit of a revision, the first of ``rest``, and its files."""
        hub = self.server
        commit = rest[0] if rest and (repository, rest[0]) in hub.history else hub.head(repository)
        return commit, hub.history.get((repository, commit), hub.repositories[repository])

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

    def file(self, name: str, content: bytes, *, body: bool, commit: str) -> None:
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
        self.send_header("X-Repo-Commit", commit)
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


def use_hub(hub: Hub, patch: Any, home: Path, token: str | None = "secret") -> None:
    """Make this hub the only one that the test's process knows, with an empty cache in ``home``.

    Args:
        hub: The hub.
        patch: pytest's ``monkeypatch``.
        home: The folder of the caches.
        token: The token of the user.
    """
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    values = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in {**values, "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}.items():
        patch.setattr(constants, name, value)
    patch.setenv("METEORA_CACHE", str(home / "meteora"))
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


def hub_environment(hub: Hub, home: object, token: str | None = "secret") -> dict[str, str]:
    """The environment of a process of its own that knows only this hub, with an empty cache in ``home``."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "METEORA_CACHE": f"{home}/meteora", "HF_HUB_OFFLINE": "0"}
    settings |= {} if token is None else {"HF_TOKEN": token}
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")}
    return {**kept, **settings, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
