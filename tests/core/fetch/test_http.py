"""Proxies, certificates and addresses from the environment: refused in one line when they cannot be used, and never quoted with their passwords."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from meteora_core.errors import DownloadError, MeteoraError, UsageError
from meteora_core.fetch import download as download_module
from meteora_core.fetch import http
from meteora_core.fetch.download import download
from meteora_core.fetch.http import certificates, check_hub_environment, http_client, problem_of_url, proxy_url, without_credentials
from meteora_core.fetch.package_index import find_pypi_file

PASSWORD = "sw0rd-fish"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_") or name.upper().endswith("_PROXY") or name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(download_module.time, "sleep", lambda seconds: None)


class Answer(BaseHTTPRequestHandler):
    """Redirects ``/away`` to the same server under another name, and keeps the headers that it saw."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/there")
            self.send_header("Content-Length", "0")
        else:
            self.send_response(200 if self.path == "/there" else int(self.path[1:4]) if self.path[1:4].isdigit() else 200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "3")
        self.end_headers()
        if self.path != "/away":
            self.wfile.write(b"abc")

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    Answer.seen = []
    running = ThreadingHTTPServer(("", 0), Answer)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PIP_PROXY", f"foo://user:{PASSWORD}@host", "does not begin with one of http://"),
        ("PIP_PROXY", f"http://user:{PASSWORD}@[bad", "host or port is malformed"),
        ("PIP_PROXY", f"http://user:{PASSWORD}@host:port", "host or port is malformed"),
        ("PIP_PROXY", f"user:{PASSWORD}@host\r\nX: y", "a blank or a control character"),
        ("PIP_PROXY", f"http://user:{PASSWORD}@", "no host"),
        ("PIP_PROXY", f"socks5://user:{PASSWORD}@host:1", "needs the package socksio"),
        ("HTTPS_PROXY", f"socks5h://user:{PASSWORD}@host:1", "HTTPS_PROXY is a SOCKS proxy"),
        ("http_proxy", f"foo://user:{PASSWORD}@host", "http_proxy is not a usable URL"),
        ("ALL_PROXY", f"http://user:{PASSWORD}@[::1", "ALL_PROXY is not a usable URL"),
        ("PIP_CERT", "/nowhere/cert.pem", "does not exist"),
        ("PIP_CERT", __file__, "contains no certificates"),
        ("REQUESTS_CA_BUNDLE", __file__, "REQUESTS_CA_BUNDLE names"),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE names"),
    ],
)
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setattr(http, "find_spec", lambda name: None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message) as caught, http_client():
        pass
    assert PASSWORD not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
    assert "\n" not in caught.value.message


def test_a_proxy_without_a_scheme_is_an_http_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert proxy_url("x", f"user:{PASSWORD}@host:3128") == f"http://user:{PASSWORD}@host:3128"
    monkeypatch.setenv("PIP_PROXY", f"user:{PASSWORD}@127.0.0.1:9")
    with pytest.raises(DownloadError) as caught:
        download("http://host.invalid/x", tmp_path / "x")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("index", [f"http://u:{PASSWORD}@[bad/simple", f"u:{PASSWORD}@host/simple", f"ftp://u:{PASSWORD}@host/", f"https://u:{PASSWORD}@h h/"])
def test_indexes_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index)
    with pytest.raises(MeteoraError) as caught:
        find_pypi_file("x", "1", ".whl")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(("endpoint", "token"), [("http://[bad", ""), ("huggingface.co", ""), ("https://h", "hf_\r\nx"), ("https://h", "hf_\u00e4"), ("", "")])
def test_the_hubs_settings(monkeypatch: pytest.MonkeyPatch, endpoint: str, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=r"HF_ENDPOINT|HF_TOKEN"):
        check_hub_environment(endpoint)
    monkeypatch.delenv("HF_TOKEN")
    check_hub_environment("https://huggingface.co")


def test_urls() -> None:
    assert problem_of_url("https://[::1]:8080/x", ("https",)) is None
    assert problem_of_url("https://ex\u00e4mple.org/", ("https",)) is None
    assert problem_of_url("https://..", ("https",)) is not None
    assert without_credentials("https://u:p@h:1/x?token=1#f") == "https://h:1/x"
    assert PASSWORD not in without_credentials(f"http://u:{PASSWORD}@[bad/x?y={PASSWORD}")


def test_certificates_of_a_folder(tmp_path: Path) -> None:
    assert certificates("x", str(tmp_path)).get_ca_certs() == []


def test_a_login_does_not_follow_a_redirect_to_another_host(server: str, tmp_path: Path) -> None:
    download(f"http://user:{PASSWORD}@{server}/away", tmp_path / "x")
    assert [path for path, _ in Answer.seen] == ["/away", "/there"]
    assert Answer.seen[0][1] is not None
    assert Answer.seen[1][1] is None


@pytest.mark.parametrize(("status", "hint"), [(401, "needs a login"), (403, "needs a login"), (404, "check the address"), (407, "proxy needs a login")])
def test_refusals(server: str, tmp_path: Path, status: int, hint: str) -> None:
    with pytest.raises(DownloadError, match=f"answered {status}") as caught:
        download(f"http://user:{PASSWORD}@{server}/{status}?token={PASSWORD}", tmp_path / "x")
    assert hint in (caught.value.hint or "")
    assert PASSWORD not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_more_bytes_than_promised(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="longer than the 2 bytes"):
        download(f"http://{server}/file", tmp_path / "x", size=2)


def test_certificates_and_proxies_are_not_tried_again() -> None:
    for error, text in (
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "is not trusted"),
        (httpx.ProxyError("407 Proxy Authentication Required"), "the proxy refused"),
        (httpx.InvalidURL("bad"), "bad"),
    ):
        failure = http.final_failure(error, "name")
        assert failure is not None
        assert text in failure.message
    assert http.final_failure(httpx.ReadTimeout("slow"), "name") is None


def test_log_messages_hold_no_password(caplog: pytest.LogCaptureFixture, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meteora_cli.console import guard_messages

    before = logging.getLogRecordFactory()
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr("warnings.formatwarning", None)
    try:
        guard_messages()
        with caplog.at_level(logging.DEBUG):
            download(f"http://user:{PASSWORD}@{server}/file", tmp_path / "x")
    finally:
        logging.setLogRecordFactory(before)
    assert "HTTP Request" in caplog.text
    assert PASSWORD not in caplog.text
