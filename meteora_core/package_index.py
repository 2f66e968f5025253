"""The package index that pip is configured for: where it is, and which files it has.

Reads the simple repository API, in JSON and in HTML, over http(s) and from file:// folders, and flat ``find-links`` folders and pages.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, unquote, urldefrag, urljoin, urlsplit

from meteora_core.errors import DownloadError

PUBLIC_INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"

Found = tuple[str, str | None, int | None]
"""A file's URL, its SHA-256 and its length where they are known."""


@dataclass(frozen=True)
class PipSettings:
    """The part of pip's configuration that says where packages come from."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...]
    cert: str | None
    proxy: str | None


def pip_settings() -> PipSettings:
    """pip's configuration files, asked for once a process, and the ``PIP_*`` environment as it is now; without both, the public index."""
    values: dict[str, str] = {}
    for line in _pip_listing(os.environ.get("PIP_CONFIG_FILE")).splitlines():
        key, _, value = line.partition("=")
        scope, _, option = key.rpartition(".")
        if scope in ("global", "install", "download"):
            values[option.replace("_", "-")] = _literal(value)
    for name, value in os.environ.items():
        if name.startswith("PIP_") and value:
            values[name[4:].lower().replace("_", "-")] = value
    indexes = [] if values.get("no-index", "").lower() in ("1", "true", "yes", "on") else [values.get("index-url", PUBLIC_INDEX)]
    if indexes:
        indexes += values.get("extra-index-url", "").split()
    return PipSettings(tuple(indexes), tuple(values.get("find-links", "").split()), values.get("cert"), values.get("proxy"))


@lru_cache
def _pip_listing(config_file: str | None) -> str:
    """What ``pip config list`` prints, with ``PIP_CONFIG_FILE`` as given; "" without pip."""
    try:
        return subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _literal(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        return text


def find_file(project: str, version: str, suffix: str) -> Found:
    """Find a file of a release; see :func:`meteora_core.downloads.find_pypi_file`."""
    from packaging.utils import canonicalize_name

    settings = pip_settings()
    name = canonicalize_name(project)
    places = [*settings.find_links, *(f"{index.rstrip('/')}/{name}/" for index in settings.indexes)]
    failures: list[str] = []
    fallback: Found | None = None
    for place in places:
        try:
            for found in _files(place):
                if _is_release(found[0], name, version, suffix):
                    if found[1] is not None:
                        return found
                    fallback = fallback or found
        except DownloadError as error:
            failures.append(error.message)
    if fallback is not None:
        return fallback
    wanted = f"{project} {version} (*{suffix})"
    if failures:
        raise DownloadError(
            f"cannot look up {wanted} on the package index: {failures[0]}", hint="check the network connection, the proxy, and `pip config list`"
        )
    raise DownloadError(f"the package index has no {wanted}", hint="check the index that pip is configured for: `pip config list`")


def _is_release(url: str, name: str, version: str, suffix: str) -> bool:
    from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
    from packaging.version import InvalidVersion, Version

    filename = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if not filename.endswith(suffix):
        return False
    try:
        found = parse_wheel_filename(filename)[:2] if filename.endswith(".whl") else parse_sdist_filename(filename)
        return found == (name, Version(version))
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return False


def _files(place: str) -> Iterator[Found]:
    """The files that a project's page, or a find-links page or folder, lists. A missing page lists nothing."""
    from meteora_core.downloads import local_path

    scheme = urlsplit(place).scheme
    if scheme in ("http", "https"):
        yield from _remote(place)
        return
    path = local_path(place) if scheme == "file" else Path(place).expanduser()
    if path.is_dir() and (path / "index.html").is_file():
        path = path / "index.html"
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.is_file():
                yield entry.resolve().as_uri(), None, entry.stat().st_size
    elif path.is_file():
        yield from _links(path.read_text(encoding="utf-8", errors="replace"), path.resolve().as_uri())


def _remote(url: str) -> Iterator[Found]:
    import httpx

    from meteora_core.downloads import http_client, without_credentials

    try:
        with http_client() as client:
            response = client.get(url, headers={"Accept": ACCEPT})
    except httpx.HTTPError as error:
        raise DownloadError(f"{without_credentials(url)}: {error}") from error
    if response.status_code == 404:
        return
    if response.status_code >= 400:
        raise DownloadError(f"{without_credentials(url)} answered {response.status_code}")
    base = str(response.url)
    if "json" not in response.headers.get("Content-Type", ""):
        yield from _links(response.text, base)
        return
    try:
        for entry in response.json()["files"]:
            digest = (entry.get("hashes") or {}).get("sha256")
            yield _with_login(urljoin(base, entry["url"]), base), digest, entry.get("size")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as broken:
        raise DownloadError(f"{without_credentials(url)} did not answer with a package list") from broken


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.base: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.targets.append(href)
        elif tag == "base" and href and self.base is None:
            self.base = href


def _links(page: str, base: str) -> Iterator[Found]:
    anchors = _Anchors()
    anchors.feed(page)
    if anchors.base:
        base = urljoin(base, anchors.base)
    for target in anchors.targets:
        url, fragment = urldefrag(urljoin(base, target))
        yield _with_login(url, base), parse_qs(fragment).get("sha256", [None])[0], None


def _with_login(url: str, base: str) -> str:
    """Carry the login of an index over to its files on the same host, as pip does."""
    login, at, host = urlsplit(base).netloc.rpartition("@")
    parts = urlsplit(url)
    if not at or parts.netloc != host:
        return url
    return parts._replace(netloc=f"{login}@{host}").geturl()
