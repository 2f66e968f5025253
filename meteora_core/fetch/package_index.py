"""The package index that pip is configured for: where it is, and which files it has.

Reads the simple repository API, in JSON and in HTML, over http(s) and from file:// folders, and flat ``find-links`` folders and pages.
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
"""A longer answer (64 MiB) is no list of a project's files."""


@dataclass(frozen=True)
class PypiFile:
    """A file of a release on the package index.

    Attributes:
        url: Its address (http, https or file).
        sha256: Its SHA-256; None when the index does not state it.
        size: Its length in bytes; None when the index does not state it.
    """

    url: str
    sha256: str | None
    size: int | None

    @property
    def filename(self) -> str:
        """The file's name."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]


def find_pypi_file(project: str, version: str, filename_suffix: str) -> PypiFile:
    """Find a release's file on the index that pip is configured for.

    pip's own configuration counts: ``index-url``, ``extra-index-url``, ``find-links``, ``no-index``, ``cert`` and ``proxy`` from its files and from ``PIP_*``.

    Args:
        project: The project's name; spelling variants (case, ``-`` and ``_``) are the same.
        version: The release.
        filename_suffix: The end of the file's name: ``".tar.gz"`` or ``"-py3-none-any.whl"``.

    Returns:
        The first match; one with a hash is preferred.

    Raises:
        DownloadError: No index can be reached, or none has the file.
    """
    from packaging.utils import canonicalize_name

    settings = pip_settings()
    name = canonicalize_name(project)
    for index in settings.indexes:
        if scheme_of(index) != "file":
            check_url("the index of pip (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL)", index)
    places = [*settings.find_links, *(f"{index.rstrip('/')}/{name}/" for index in settings.indexes)]
    failures: list[str] = []
    fallback: PypiFile | None = None
    for place in places:
        try:
            for found in _files(place):
                if _is_release(found, name, version, filename_suffix):
                    if found.sha256 is not None:
                        return found
                    fallback = fallback or found
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
        found = parse_wheel_filename(filename)[:2] if filename.endswith(".whl") else parse_sdist_filename(filename)
        return found == (name, Version(version))
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return False


def _files(place: str) -> Iterator[PypiFile]:
    """The files that a project's page, or a find-links page or folder, lists. A missing page lists nothing."""
    scheme = scheme_of(place)
    if scheme in ("http", "https"):
        for file in _remote(place):
            if scheme_of(file.url) in ("http", "https"):  # a server must not name files of this machine
                yield file
        return
    path = local_path(place) if scheme == "file" else Path(place).expanduser()
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
    """An absolute URL out of a page's link; None for one that is malformed."""
    try:
        full = urljoin(base, target)
        urlsplit(full)
    except ValueError:
        return None
    return full


def scheme_of(url: str) -> str:
    """The scheme of a URL; empty for a path or for what cannot be parsed."""
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
    with suppress(AssertionError):  # Python's parser gives up on a malformed declaration; what came before it counts
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
    """Carry the login of an index over to its files on the same host, as pip does, but never from https to http."""
    login, at, host = urlsplit(base).netloc.rpartition("@")
    parts = urlsplit(url)
    if not at or parts.netloc != host or (urlsplit(base).scheme == "https" and parts.scheme != "https"):
        return url
    return parts._replace(netloc=f"{login}@{host}").geturl()
