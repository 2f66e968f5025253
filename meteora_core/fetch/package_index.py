"""Finds files on the package index that pip is configured for.

Reads the simple repository API in JSON and HTML, over HTTP and from file:// folders, and flat ``find-links`` folders and pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, unquote, urldefrag, urljoin, urlsplit

from meteora_core.errors import DownloadError
from meteora_core.fetch.http import check_url, final_failure, http_client, local_path, refuse, without_credentials
from meteora_core.fetch.pip_settings import pip_settings
from meteora_core.json_files import decode_json
from meteora_core.reading import read_bytes
from meteora_core.text import one_line, redact

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"

MAX_PAGE = 64 << 20
"""The size in bytes (64 MiB) above which a response cannot be the list of a project's files."""


@dataclass(frozen=True)
class PypiFile:
    """A file of a release on the package index.

    Attributes:
        url: The address, with the scheme http, https or file.
        sha256: The SHA-256; None if the index does not state it.
        size: The length in bytes; None if the index does not state it.
    """

    url: str
    sha256: str | None
    size: int | None

    @property
    def filename(self) -> str:
        """The name of the file."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]


def find_pypi_file(project: str, version: str, filename_suffix: str) -> PypiFile:
    """Find a release's file on the index that pip is configured for.

    This uses ``index-url``, ``extra-index-url``, ``find-links``, ``no-index``, ``cert`` and ``proxy`` from pip's configuration files and ``PIP_*``.

    Args:
        project: The name of the project, in any spelling (case, ``-`` or ``_``).
        version: The version of the release.
        filename_suffix: The end of the file's name, ``".tar.gz"`` or ``"-py3-none-any.whl"``.

    Returns:
        The first matching file with a hash, or else the first matching file.

    Raises:
        DownloadError: No index can be reached, or no index has the file.
    """
    from packaging.utils import canonicalize_name

    settings = pip_settings()
    name = canonicalize_name(project)
    for index in settings.indexes:
        if scheme_of(index) != "file":
            check_url("the index of pip (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL)", index)
    pages = [*settings.find_links, *(f"{index.rstrip('/')}/{name}/" for index in settings.indexes)]
    failures: list[str] = []
    fallback: PypiFile | None = None
    for page in pages:
        try:
            for file in _files(page):
                if _is_release(file, name, version, filename_suffix):
                    if file.sha256 is not None:
                        return file
                    fallback = fallback or file
        except DownloadError as error:
            failures.append(error.message)
    if fallback is not None:
        return fallback
    wanted = f"{project} {version} (*{filename_suffix})"
    if failures:
        raise DownloadError(
            f"cannot look up {wanted} on the package index: {failures[0]}", hint="check the network connection, the proxy, and `pip config list`"
        )
    raise DownloadError(f"the package index has no {wanted}", hint="check the index that pip is configured for: `pip config list`")


def _is_release(file: PypiFile, name: str, version: str, suffix: str) -> bool:
    from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
    from packaging.version import InvalidVersion, Version

    try:
        filename = file.filename
    except ValueError:
        return False
    if not filename.endswith(suffix):
        return False
    try:
        name_and_version = parse_wheel_filename(filename)[:2] if filename.endswith(".whl") else parse_sdist_filename(filename)
        return name_and_version == (name, Version(version))
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return False


def _files(location: str) -> Iterator[PypiFile]:
    """Yield the files that a project's page, or a find-links page or folder, lists; none if the page is missing."""
    scheme = scheme_of(location)
    if scheme in ("http", "https"):
        for file in _remote(location):
            if scheme_of(file.url) in ("http", "https"):  # a server must not make us read local files
                yield file
        return
    path = local_path(location) if scheme == "file" else Path(location).expanduser()
    if path.is_dir() and (path / "index.html").is_file():
        path = path / "index.html"
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.is_file():
                yield PypiFile(entry.resolve().as_uri(), None, entry.stat().st_size)
    elif path.is_file():
        yield from _links(read_bytes(path, DownloadError).decode(errors="replace"), path.resolve().as_uri())


def _remote(url: str) -> Iterator[PypiFile]:
    import httpx

    name = without_credentials(url)
    try:
        with http_client() as client, client.stream("GET", url, headers={"Accept": ACCEPT}) as response:
            if response.status_code == 404:
                return
            if response.status_code >= 400:
                refuse(name, response.status_code)
            body = bytearray()
            for block in response.iter_bytes():
                body += block
                if len(body) > MAX_PAGE:
                    raise DownloadError(f"{name} answered with more than {MAX_PAGE >> 20} MB, which is no package list")
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
        failure = final_failure(error, name) or DownloadError(f"cannot reach {name}: {one_line(redact(str(error)), limit=200) or type(error).__name__}")
        raise failure from None
    base = str(response.url)
    text = body.decode(errors="replace")
    if "json" not in response.headers.get("Content-Type", ""):
        yield from _links(text, base)
        return
    try:
        entries = [(str(entry["url"]), (entry.get("hashes") or {}).get("sha256"), entry.get("size")) for entry in decode_json(text)["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DownloadError(f"{name} did not answer with a package list") from None
    for target, digest, size in entries:
        if full := _joined(base, target):
            known = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
            yield PypiFile(_with_login(full, base), digest if known else None, size if isinstance(size, int) and 0 <= size < 1 << 50 else None)


def _joined(base: str, target: str) -> str | None:
    """Return the absolute URL of a page's link; None if the link is malformed."""
    try:
        full = urljoin(base, target)
        urlsplit(full)
    except ValueError:
        return None
    return full


def scheme_of(url: str) -> str:
    """Return the scheme of a URL; an empty string for a path or a malformed URL."""
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


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


def _links(page: str, base: str) -> Iterator[PypiFile]:
    anchors = _Anchors()
    with suppress(AssertionError):  # Python's parser stops at a malformed declaration; the links before it are used
        anchors.feed(page)
    if anchors.base:
        base = _joined(base, anchors.base) or base
    for target in anchors.targets:
        full = _joined(base, target)
        if full is None:
            continue
        url, fragment = urldefrag(full)
        yield PypiFile(_with_login(url, base), parse_qs(fragment).get("sha256", [None])[0], None)


def _with_login(url: str, base: str) -> str:
    """Add the login of an index to the URLs of its files on the same host, as pip does, but never from https to http."""
    login, at, host = urlsplit(base).netloc.rpartition("@")
    parts = urlsplit(url)
    if not at or parts.netloc != host or (urlsplit(base).scheme == "https" and parts.scheme != "https"):
        return url
    return parts._replace(netloc=f"{login}@{host}").geturl()
