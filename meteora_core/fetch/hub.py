"""Fetches checkpoints and models from the Hugging Face hub: only safetensors, configurations and tokenizers."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from meteora_core.errors import DownloadError, MeteoraError, StorageError, UsageError
from meteora_core.fetch.http import check_hub_environment
from meteora_core.fetch.hub_access import ALLOWED, REFUSED, Counter, Gone, Request, Unreachable, explain
from meteora_core.files import sha256, storage_errors
from meteora_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

ATTEMPTS = 6
"""The number of consecutive attempts without a new byte after which a download fails."""

_ALONE = 1 << 20
"""The size in bytes (1 MiB) from which files are fetched one at a time, so that a later run can resume them."""

_BLOCK = 1 << 18
"""The largest number of bytes that a broken connection loses (256 KiB); with huggingface_hub's blocks of 10 MB, a small file would be lost."""


@dataclass(frozen=True)
class KnownRepo:
    """A checkpoint that the MeteoRA authors published.

    Attributes:
        repositories: The repositories that hold it; the next one is tried if one no longer exists.
        include: Glob patterns of the files that are fetched by default.
        base: The base model that the checkpoint requires.
        description: A one-line description.
    """

    repositories: tuple[str, ...]
    include: tuple[str, ...]
    base: str
    description: str


KNOWN: dict[str, KnownRepo] = {
    "meteora-llama3-8b": KnownRepo(
        ("ParagonLight/MeteoRA-llama3-8b", "hDPQ4gi9BG/MeteoRA_llama3_8b"),
        ("llama3_8b_meteora/top_2/*", "llama3_8b_peft/*"),
        "meta-llama/Meta-Llama-3-8B",
        "the authors' MeteoRA of Llama 3 8B: gates trained with top-2, and its 28 adapters",
    ),
    "meteora-llama2-13b": KnownRepo(
        ("ParagonLight/MeteoRA-llama2-13b", "hDPQ4gi9BG/MeteoRA_llama2_13b"),
        ("llama2_13b_meteora/top_2/*", "llama2_13b_peft/*"),
        "meta-llama/Llama-2-13b-hf",
        "the authors' MeteoRA of Llama 2 13B: gates trained with top-2, and its 28 adapters",
    ),
}


@dataclass(frozen=True)
class HubDownload:
    """The result of a download.

    Attributes:
        path: The folder, which has the layout of the repository.
        repository: The id of the repository.
        revision: The commit, if known.
        files: The names of the requested files in the repository.
        size: The total size of these files in bytes.
        fetched: The number of these bytes that had to be fetched.
    """

    path: Path
    repository: str
    revision: str | None
    files: tuple[str, ...]
    size: int
    fetched: int


@dataclass(frozen=True)
class HubOptions:
    """Options of a download from the hub: which files, from which server, and to which folder.

    Attributes:
        revision: A branch, a tag or a commit; None means the default branch.
        include: Glob patterns; only files of an allowed kind that match one of them are fetched. None means all files of an allowed kind.
        folder: The folder to write to; None means the hub's cache, where transformers finds a base model by its id.
        endpoint: The address of the hub; None means HF_ENDPOINT or huggingface.co.
        cache: The folder of the hub's cache; None means the default.
    """

    revision: str | None = None
    include: tuple[str, ...] | None = None
    folder: str | Path | None = None
    endpoint: str | None = None
    cache: str | Path | None = None


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``"org/repo@revision"`` into ``("org/repo", "revision")``; without ``@``, the revision is None.

    Raises:
        UsageError: The name is not a repository id.
    """
    repository, mark, revision = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository) or (mark and not revision):
        raise UsageError(f"{name!r} is not a hub repository", hint="write ORGANISATION/NAME or ORGANISATION/NAME@REVISION")
    return repository, revision or None


def download_known(name: str, options: HubOptions = HubOptions(), *, force: bool = False, progress: Progress = SILENT) -> HubDownload:
    """Fetch a checkpoint in :data:`KNOWN`; see :func:`download_repo` for the other arguments.

    Raises:
        UsageError: The name is unknown.
        DownloadError: No repository has the checkpoint, or the download fails.
        StorageError: The disk is full or not writable.
    """
    if name not in KNOWN:
        raise UsageError(f"no checkpoint named {name!r}", hint=f"known: {', '.join(KNOWN)}")
    entry = KNOWN[name]
    for position, repository in enumerate(entry.repositories):
        try:
            return download_repo(repository, replace(options, include=options.include or entry.include), force=force, progress=progress)
        except Gone as gone:
            if position == len(entry.repositories) - 1:
                raise
            progress.note(f"{gone.message}; trying {entry.repositories[position + 1]}")
    raise AssertionError("a known checkpoint names at least one repository")


def download_repo(repository: str, options: HubOptions = HubOptions(), *, force: bool = False, progress: Progress = SILENT) -> HubDownload:
    """Fetch the safetensors, configurations and tokenizer of a hub repository. Files that exist already are not fetched again.

    After a broken connection, another attempt or a later call resumes the download. Large files are checked against the hash that the hub states.
    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as in huggingface_hub; without the network, a complete earlier download is used.

    Args:
        repository: The id of the repository.
        options: The files to fetch, the server and the folder.
        force: Whether to fetch files again that exist already.
        progress: The receiver of progress reports.

    Raises:
        DownloadError: The repository or revision does not exist, a permission or the network is missing, there is nothing to fetch, or a file does not
            have the expected hash; the hint says what to do.
        StorageError: The disk is too full or not writable.
    """
    from huggingface_hub import constants, snapshot_download

    folder, cache, endpoint, include = options.folder, options.cache, options.endpoint, options.include
    target = Path(folder or cache or constants.HF_HUB_CACHE)
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    request = Request(repository, options.revision, None if folder is None else str(folder), None if cache is None else str(cache), endpoint, include)
    if constants.HF_HUB_OFFLINE:
        return _from_disk(request)
    check_hub_environment(endpoint or constants.ENDPOINT)
    try:
        plan = _plan(request)
    except Unreachable as unreachable:
        try:
            earlier = _from_disk(request)
        except DownloadError:
            raise unreachable from None
        progress.note(f"{unreachable.message}; using the copy that was fetched before")
        return earlier
    if not plan:
        what = f" that match {', '.join(include)}" if include else ""
        raise DownloadError(f"{repository} holds no safetensors, configuration or tokenizer files{what}", hint="look at its file list on the hub")
    if force:
        for file in plan:
            _forget(Path(file.local_path))
    missing = [file for file in plan if force or file.will_download]
    need = sum(file.file_size or 0 for file in missing)
    _check_space(target, need, repository)
    commit, names = plan[0].commit_hash, [file.filename for file in plan]
    with progress.task(f"downloading {repository}", total=need, unit="B") as task, _small_blocks():
        counter = Counter(task)
        for file in missing:
            if _ALONE <= (file.file_size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                _persist(partial(_fetch, request, file, commit, target, counter), counter, request)
                counter.start(counter.before + (file.file_size or 0))
        arguments = {**request.arguments(), "allow_patterns": [_literal(name) for name in names], "max_workers": 4, "tqdm_class": counter.bar_class()}
        path = Path(_persist(lambda: str(snapshot_download(**arguments)), counter, request))
    return HubDownload(path, repository, commit, tuple(names), sum(file.file_size or 0 for file in plan), need)


def _forget(path: Path) -> None:
    """Delete a fetched file and, if it is a link in the hub's cache, its target."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _fetch(request: Request, file: DryRunFileInfo, commit: str, target: Path, counter: Counter) -> str:
    """Fetch one large file to the path where huggingface_hub looks for it, and resume a partial file, also of an earlier run.

    huggingface_hub itself starts every file from the beginning in each run.
    """
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="meteora")
    url = hf_hub_url(request.repository, file.filename, revision=commit, endpoint=request.endpoint)
    metadata = get_hf_file_metadata(url, headers=headers, endpoint=request.endpoint)
    etag, size = metadata.etag or "", metadata.size
    if not re.fullmatch(r"[\w-]+", etag):
        return ""
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    if request.folder is None:
        final = target / f"models--{request.repository.replace('/', '--')}" / "blobs" / etag
        part = final.with_name(f"{etag}.part")
    else:
        final = target / file.filename
        part = target / ".cache" / "meteora" / f"{etag}.part"
    for folder in (final.parent, part.parent):
        folder.mkdir(parents=True, exist_ok=True)
    lock = part.with_suffix(".lock")
    with FileLock(lock):
        if request.folder is None and final.is_file():
            return str(final)
        with part.open("ab") as handle:
            if size is not None and handle.tell() > size:
                handle.truncate(0)
                handle.seek(0)
            http_get(
                metadata.location,
                handle,
                resume_size=handle.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=file.filename,
                tqdm_class=counter.bar_class(),
            )
        if re.fullmatch(r"[0-9a-f]{64}", etag) and sha256(part) != etag:
            part.unlink()
            raise DownloadError(
                f"{file.filename} of {request.repository} is damaged: its hash differs", hint="run the command again; only this file is fetched"
            )
        if request.folder is not None:
            (target / ".cache" / "huggingface" / "download" / f"{file.filename}.metadata").unlink(missing_ok=True)
        part.chmod(0o644)
        part.replace(final)
    lock.unlink(missing_ok=True)
    return str(final)


def _plan(request: Request) -> list[DryRunFileInfo]:
    """Return the size of every requested file and whether it exists already. Asks the hub up to three times."""
    from huggingface_hub import snapshot_download

    for attempt in range(3):
        try:
            listing = snapshot_download(
                **request.arguments(),
                allow_patterns=list(ALLOWED),
                ignore_patterns=list(REFUSED),
                dry_run=True,
                max_workers=4,
                tqdm_class=Counter(None).bar_class(),
            )
            return sorted((file for file in listing if request.wants(file.filename)), key=lambda file: file.filename)
        except Exception as error:
            explained = explain(error, request)
            if attempt == 2 or not isinstance(explained, Unreachable):
                raise explained from error
            time.sleep(0.5 * (attempt + 1))
    raise AssertionError("the loop returns or raises")


def _persist(fetch: Callable[[], str], counter: Counter, request: Request) -> str:
    """Call ``fetch`` until it succeeds. Fail after :data:`ATTEMPTS` consecutive attempts without a new byte, or at once if a retry cannot succeed."""
    failures = 0
    while True:
        before = counter.done
        try:
            return fetch()
        except Exception as error:
            explained = error if isinstance(error, MeteoraError) else explain(error, request)
            failures = 1 if counter.done > before else failures + 1
            if failures >= ATTEMPTS or not isinstance(explained, Unreachable):
                raise explained from error
        time.sleep(min(0.2 * 2**failures, 10.0))


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Make huggingface_hub write downloads in blocks of :data:`_BLOCK` bytes while the block runs."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = min(before, _BLOCK)
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


def _from_disk(request: Request) -> HubDownload:
    """Return an earlier, complete download. Raises DownloadError if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        names = _listed_before(request)
        patterns = list(request.include or ALLOWED) if names is None else [_literal(name) for name in names]
        path = Path(snapshot_download(**request.arguments(), allow_patterns=patterns, ignore_patterns=list(REFUSED), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise DownloadError(
            f"{request.repository} is not completely in the cache, and HF_HUB_OFFLINE forbids downloads",
            hint="unset HF_HUB_OFFLINE once to fetch it, or set HF_HOME to the cache that holds it",
        ) from error
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and request.wants(str(file.relative_to(path))))
    if not files:
        raise DownloadError(f"{request.repository} is in the cache, but without the requested files", hint="unset HF_HUB_OFFLINE once to fetch it")
    commit = path.name if request.folder is None else None
    return HubDownload(path, request.repository, commit, tuple(files), sum((path / name).stat().st_size for name in files), 0)


def _listed_before(request: Request) -> list[str] | None:
    """Return the requested files as the hub listed them at the last download; None if no list was kept."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        tree = get_cached_repo_tree(request.repository, revision=request.revision, cache_dir=request.cache, local_dir=request.folder)
    except CachedRepoTreeNotFoundError:
        return None
    return [file.path for file in tree if request.wants(file.path)]


def _literal(name: str) -> str:
    """Return a glob pattern that matches only ``name``."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _check_space(target: Path, need: int, repository: str) -> None:
    folders = (target / f"models--{repository.replace('/', '--')}" / "blobs", target / ".cache" / "meteora")
    partial_bytes = sum(file.stat().st_size for folder in folders for file in folder.glob("*.part"))
    free = shutil.disk_usage(target).free
    if free < need - partial_bytes:
        raise StorageError(
            f"{target} has {free / 1e9:.1f} GB free, and {repository} needs {need / 1e9:.1f} GB",
            hint="free some space, or choose another disk with --to or HF_HOME",
        )
