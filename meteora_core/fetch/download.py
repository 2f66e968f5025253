"""Downloads single files, with progress; interrupted downloads resume, and complete ones are checked against a hash."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from meteora_core.errors import DownloadError, StorageError
from meteora_core.fetch.http import final_failure, http_client, local_path, refuse, without_credentials
from meteora_core.files import cache_dir, storage_errors
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.reading import open_regular, read_errors
from meteora_core.text import one_line, redact

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 20
ATTEMPTS = 6
"""The number of consecutive attempts without a new byte after which a download fails."""

NETWORK_HINT = "check the network connection and proxy; run the command again to resume the download"


def downloads_dir() -> Path:
    """Return the folder of downloaded files."""
    return cache_dir() / "downloads"


def download(
    url: str, dest: Path, *, sha256: str | None = None, size: int | None = None, progress: Progress = SILENT, title: str | None = None, attempts: int = ATTEMPTS
) -> Path:
    """Fetch ``url`` into ``dest``, unless ``dest`` exists and has the expected hash.

    Bytes are written to ``dest`` + ``.part``, where a later attempt or call resumes. Only a complete file with the expected hash gets the name ``dest``.
    Processes that download the same file wait for each other.

    Args:
        url: The address, with the scheme http, https or file.
        dest: The file to write.
        sha256: The expected SHA-256. Without it, only the length that the server states is checked, and an existing ``dest`` is returned unchecked.
        size: The expected length in bytes, if known.
        progress: The receiver of progress reports.
        title: The title of the download in progress reports; the file's name by default.
        attempts: The number of consecutive attempts without a new byte after which the download fails.

    Returns:
        ``dest``.

    Raises:
        DownloadError: The network failed repeatedly, the server refused the request, or the file does not have the expected hash.
        StorageError: The disk is full or the folder is not writable.
    """
    from filelock import FileLock

    dest = Path(dest)
    with storage_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(dest.with_name(f".{dest.name}.lock"))
        lock.acquire()
    try:
        if dest.is_file() and (sha256 is None or _hash_of(dest) == sha256):
            return dest
        part = dest.with_name(dest.name + ".part")
        with progress.task(title or dest.name, total=size, unit="B") as task:
            fetch = _Fetch(url, part, sha256, size, task, attempts)
            if urlsplit(url).scheme == "file":
                fetch.copy()
            else:
                fetch.run()
        with storage_errors(dest):
            os.replace(part, dest)
        return dest
    finally:
        lock.release()


def _hash_of(path: Path) -> str:
    from meteora_core.files import sha256

    return sha256(path)


class _Cut(Exception):
    """The connection failed in a way that another attempt may cure."""


class _Fetch:
    """The state of one download over all attempts."""

    def __init__(self, url: str, part: Path, sha256: str | None, size: int | None, task: ProgressBar, attempts: int) -> None:
        self.url = url
        self.attempts = attempts
        self.name = without_credentials(url)
        self.part = part
        self.sha256 = sha256
        self.size = size
        self.task = task
        self.done = 0
        self.shown = 0
        self.digest: Any = hashlib.sha256()

    def run(self) -> None:
        """Fetch over HTTP until the part file is complete and has the expected hash."""
        with http_client() as client:
            resumed = self._load_part()
            failures = 0
            while True:
                if self.done and self.sha256 is not None and self.done == self.size and self.digest.hexdigest() == self.sha256:
                    return
                before = self.done
                try:
                    self._attempt(client)
                except _Cut as cut:
                    failures = 1 if self.done > before else failures + 1
                    if failures >= self.attempts:
                        raise DownloadError(f"cannot download {self.name}: {cut}", hint=NETWORK_HINT) from cut
                    resumed = True
                    time.sleep(min(0.2 * 2**failures, 10.0))
                    continue
                if self.sha256 is None or self.digest.hexdigest() == self.sha256:
                    return
                actual = self.digest.hexdigest()
                self._restart()
                if not resumed:
                    raise DownloadError(
                        f"{self.name} is not the expected file: its SHA-256 is {actual}, not {self.sha256}",
                        hint="the index or a proxy may serve a changed file; try again later or from another index",
                    )
                resumed = False

    def copy(self) -> None:
        """Copy the file of a file:// URL."""
        source = local_path(self.url)
        with open_regular(source, DownloadError, hint="the package index lists a file that does not exist") as reader, self._open("wb") as writer:
            self._start(os.fstat(reader.fileno()).st_size)
            while block := self._block(reader, source):
                self._take(writer, block)
        if self.sha256 is not None and self.digest.hexdigest() != self.sha256:
            self._restart()
            raise DownloadError(f"{source} is not the expected file: its SHA-256 is {self.digest.hexdigest()}, not {self.sha256}")

    @staticmethod
    def _block(reader: IO[bytes], source: Path) -> bytes:
        with read_errors(source, DownloadError):
            return reader.read(CHUNK)

    def _load_part(self) -> bool:
        """Hash an earlier part file, to resume it; return whether it has any bytes."""
        if not self.part.is_file():
            return False
        with open_regular(self.part, StorageError) as reader, read_errors(self.part, StorageError):
            while block := reader.read(CHUNK):
                self.digest.update(block)
                self.done += len(block)
        self._show()
        return self.done > 0

    def _restart(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()
        with self._open("wb"):
            pass
        self._show()

    def _attempt(self, client: httpx.Client) -> None:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        try:
            with client.stream("GET", self.url, headers=headers) as response:
                if response.status_code == 416 and self.done:
                    if self.sha256 is not None and self.digest.hexdigest() == self.sha256:
                        return
                    self._restart()
                    raise _Cut("the server does not have the rest of the file")
                self._check_status(response)
                mode = "ab"
                if self.done and not self._continues(response):
                    self._restart()
                    mode = "wb"
                length = response.headers.get("Content-Length", "")
                expected = self.done + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
                self._start(expected if expected is not None else self.size)
                with self._open(mode) as writer:
                    for block in response.iter_raw():
                        self._take(writer, block)
                        if self.size is not None and self.done > self.size:
                            raise DownloadError(
                                f"{self.name} is longer than the {self.size:,} bytes that the index states", hint="try again from another index"
                            )
                if expected is not None and self.done < expected:
                    raise _Cut(f"the connection was closed after {self.done} of {expected} bytes")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            if failure := final_failure(error, self.name):
                raise failure from None
            reason = one_line(redact(str(error)), limit=200) or type(error).__name__
            if isinstance(error, httpx.TransportError | httpx.StreamError):
                raise _Cut(reason) from None
            raise DownloadError(f"cannot download {self.name}: {reason}") from None

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise _Cut(f"the server answered {status}")
        if status >= 400:
            refuse(self.name, status)

    def _continues(self, response: httpx.Response) -> bool:
        """Whether the response contains the rest of the file, starting where the part file ends."""
        return response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {self.done}-")

    def _start(self, total: int | None) -> None:
        if total is None:
            return
        self.task.update(0, total=total)
        with storage_errors(self.part):
            free = shutil.disk_usage(self.part.parent).free
        if free < total - self.done:
            raise StorageError(
                f"{self.part.parent} has {free / 1e6:.0f} MB free, and {self.part.name.removesuffix('.part')} needs {(total - self.done) / 1e6:.0f} MB",
                hint="free some space, or set METEORA_CACHE to a folder on a larger disk",
            )

    def _take(self, writer: IO[bytes], block: bytes) -> None:
        with storage_errors(self.part):
            writer.write(block)
        self.digest.update(block)
        self.done += len(block)
        self._show()

    def _show(self) -> None:
        self.task.update(self.done - self.shown)
        self.shown = self.done

    @contextmanager
    def _open(self, mode: str) -> Iterator[IO[bytes]]:
        with storage_errors(self.part), open(self.part, mode) as handle:
            yield handle
