"""The downloader against a local server that cuts connections, lies about ranges and serves wrong bytes; the index against JSON, HTML and folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meteora_core.errors import DownloadError, StorageError
from meteora_core.fetch import download as download_module
from meteora_core.fetch import pip_settings as pip_module
from meteora_core.fetch.download import download
from meteora_core.fetch.http import without_credentials
from meteora_core.fetch.package_index import PypiFile, find_pypi_file
from meteora_core.fetch.pip_settings import pip_settings

BODY = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``pages``; ``cuts`` says after how many bytes of each answer the connection is closed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[str, bytes]] = {}
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        if self.path not in self.server.pages:
            self.send_error(404)
            return
        kind, body = self.server.pages[self.path]
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if self.server.cuts:
            rest = rest[: self.server.cuts.pop(0)]
        self.wfile.write(rest)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download_module.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        running.pages["/file.bin"] = ("application/octet-stream", BODY)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pip_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """pip without any configuration of this machine."""
    import os

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(pip_module.subprocess, "run", _no_pip)
    pip_module._pip_listing.cache_clear()
    yield
    pip_module._pip_listing.cache_clear()


def _no_pip(*args: Any, **kwargs: Any) -> Any:
    raise FileNotFoundError("no pip here")


class Recorder:
    """A progress that adds up what it is told."""

    def __init__(self) -> None:
        self.done = 0.0
        self.total: float | None = None

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[Recorder]:
        assert unit == "B"
        yield self

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self.done += advance
        self.total = total if total is not None else self.total

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_download_and_hash(server: Server, tmp_path: Path) -> None:
    progress = Recorder()
    path = download(f"{server.url}/file.bin", tmp_path / "d" / "file.bin", sha256=DIGEST, progress=progress)
    assert path.read_bytes() == BODY
    assert progress.done == progress.total == len(BODY)
    download(f"{server.url}/file.bin", path, sha256=DIGEST)
    assert len(server.asked) == 1, "a file that fits must not be fetched again"


def test_cut_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 7, 0, 200_000]
    progress = Recorder()
    path = download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST, progress=progress)
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=100007-", "bytes=100007-", "bytes=300007-"]
    assert progress.done == len(BODY)


def test_gives_up_and_goes_on_later(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000] + [0] * download_module.ATTEMPTS
    target = tmp_path / "file.bin"
    with pytest.raises(DownloadError, match=r"connection was closed|peer closed") as caught:
        download(f"{server.url}/file.bin", target, sha256=DIGEST)
    assert caught.value.hint
    assert not target.exists()
    assert (tmp_path / "file.bin.part").read_bytes() == BODY[:1000]
    server.cuts = []
    download(f"{server.url}/file.bin", target, sha256=DIGEST)
    assert server.asked[-1] == "bytes=1000-"
    assert target.read_bytes() == BODY
    assert not (tmp_path / "file.bin.part").exists()


def test_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [5000]
    progress = Recorder()
    path = download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST, progress=progress)
    assert path.read_bytes() == BODY
    assert progress.done == len(BODY)


def test_part_of_another_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"something else")
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST).read_bytes() == BODY
    (tmp_path / "file.bin").unlink()
    (tmp_path / "file.bin.part").write_bytes(BODY + b"too long")
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST).read_bytes() == BODY


def test_complete_part_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY)
    path = download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", sha256=DIGEST, size=len(BODY))
    assert path.read_bytes() == BODY


def test_wrong_hash(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not the expected file") as caught:
        download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256="0" * 64)
    assert DIGEST in caught.value.message
    assert not (tmp_path / "file.bin").exists()


def test_changed_file_in_the_cache_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"damaged")
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST).read_bytes() == BODY


def test_server_errors(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST).read_bytes() == BODY
    with pytest.raises(DownloadError, match="answered 404"):
        download(f"{server.url}/none.bin", tmp_path / "none.bin")
    server.statuses = [403]
    with pytest.raises(DownloadError, match="answered 403"):
        download(f"{server.url.replace('//', '//user:secret@')}/file.bin", tmp_path / "other.bin")


def test_no_network(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DownloadError, match="cannot download") as caught:
        download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin")
    assert "network" in (caught.value.hint or "")


def test_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="MB free") as caught:
        download(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=DIGEST)
    assert "METEORA_CACHE" in (caught.value.hint or "")


def test_file_url(tmp_path: Path) -> None:
    source = tmp_path / "a file.bin"
    source.write_bytes(BODY)
    assert download(source.as_uri(), tmp_path / "out" / "x.bin", sha256=DIGEST).read_bytes() == BODY
    with pytest.raises(DownloadError, match="not the expected file"):
        download(source.as_uri(), tmp_path / "y.bin", sha256="1" * 64)
    with pytest.raises(DownloadError, match="no such file"):
        download((tmp_path / "gone").as_uri(), tmp_path / "z.bin")


def test_index_in_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        {"filename": "my_pkg-1.0.tar.gz", "url": "../../f/my_pkg-1.0.tar.gz", "hashes": {"sha256": "a" * 64}, "size": 5},
        {"filename": "my_pkg-1.0.1.tar.gz", "url": "../../f/my_pkg-1.0.1.tar.gz", "hashes": {}},
        {"filename": "odd-name", "url": "odd-name", "hashes": {}},
    ]
    server.pages["/simple/my-pkg/"] = ("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    assert find_pypi_file("My_Pkg", "1.0", ".tar.gz") == PypiFile(f"{server.url}/f/my_pkg-1.0.tar.gz", "a" * 64, 5)
    assert find_pypi_file("my.pkg", "1.0.1", ".tar.gz") == PypiFile(f"{server.url}/f/my_pkg-1.0.1.tar.gz", None, None)
    with pytest.raises(DownloadError, match=r"has no my-pkg 2\.0"):
        find_pypi_file("my-pkg", "2.0", ".tar.gz")


def test_index_in_html_with_login(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = b'<!DOCTYPE html><html><body><a href="/f/my_pkg-1.0-py3-none-any.whl#sha256=' + b"b" * 64 + b'">x</a><a>none</a></body></html>'
    server.pages["/simple/my-pkg/"] = ("text/html", page)
    base = server.url.replace("//", "//user:secret@")
    monkeypatch.setenv("PIP_INDEX_URL", f"{base}/simple")
    found = find_pypi_file("my-pkg", "1.0", "-py3-none-any.whl")
    assert found == PypiFile(f"{base}/f/my_pkg-1.0-py3-none-any.whl", "b" * 64, None)
    assert found.filename == "my_pkg-1.0-py3-none-any.whl"
    assert without_credentials(found.url) == f"{server.url}/f/my_pkg-1.0-py3-none-any.whl"


def test_index_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "my_pkg-1.0.tar.gz").write_bytes(BODY)
    simple = tmp_path / "simple" / "my-pkg"
    simple.mkdir(parents=True)
    (simple / "index.html").write_text('<a href="../../links/my_pkg-2.0.tar.gz#sha256=' + "c" * 64 + '">2.0</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert find_pypi_file("my-pkg", "1.0", ".tar.gz") == PypiFile((links / "my_pkg-1.0.tar.gz").as_uri(), None, len(BODY))
    assert find_pypi_file("my-pkg", "2.0", ".tar.gz") == PypiFile((links / "my_pkg-2.0.tar.gz").as_uri(), "c" * 64, None)


def test_index_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages["/simple/my-pkg/"] = ("application/vnd.pypi.simple.v1+json", b"{}")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    with pytest.raises(DownloadError, match="did not answer with a package list"):
        find_pypi_file("my-pkg", "1.0", ".tar.gz")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match="cannot look up") as caught:
        find_pypi_file("my-pkg", "1.0", ".tar.gz")
    assert "secret" not in caught.value.message
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="has no"):
        find_pypi_file("my-pkg", "1.0", ".tar.gz")


def test_pip_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "global.index-url='http://one/simple'\nglobal.extra-index-url='http://two/simple\\nfile:///three'\n:env:.cert='/x'\nfreeze.timeout='1'\n"
    monkeypatch.setattr(pip_module.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": listing})())
    settings = pip_settings()
    assert settings.indexes == ("http://one/simple", "http://two/simple", "file:///three")
    assert settings.cert is None


def test_a_changed_environment_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pip_settings()
    with monkeypatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        assert pip_settings().indexes == ()
    assert pip_settings() == before
