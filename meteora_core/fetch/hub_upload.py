"""Uploads files to a repository on the Hugging Face hub, in one commit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.errors import DownloadError, MeteoraError, UsageError
from meteora_core.fetch.http import check_hub_environment
from meteora_core.fetch.hub import split_revision
from meteora_core.fetch.hub_access import Request, Unreachable, explain
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import first_line
from meteora_core.text import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from huggingface_hub import HfApi

ATTEMPTS = 4
"""Number of attempts at each request that a busy server or a broken connection ends."""

LOGIN = "run `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True)
class Uploaded:
    """The result of an upload.

    Attributes:
        repository: The id of the repository.
        revision: The commit that contains the files.
        private: Whether only its owners can read the repository.
        created: Whether the repository is new.
        url: The address of the repository.
    """

    repository: str
    revision: str
    private: bool
    created: bool
    url: str


@dataclass(frozen=True)
class UploadOptions:
    """Options of an upload.

    Attributes:
        public: Whether everyone may read a new repository.
        message: The message of the commit.
        progress: The receiver of progress reports.
    """

    public: bool = False
    message: str = "Upload a Meteora checkpoint"
    progress: Progress = SILENT


def check_repository(name: str) -> str:
    """Return the id of a repository to upload to. Raises UsageError if it is not ``user/name``."""
    repository, revision = split_revision(name)
    if revision is not None:
        raise UsageError(f"{name!r} names a revision, and uploads go to the main branch", hint=f"write {repository}")
    return repository


def upload(repository: str, files: Mapping[str, Path | bytes], options: UploadOptions = UploadOptions()) -> Uploaded:
    """Create a repository if it does not exist, and upload files to it in one commit. Files with other names stay.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as in huggingface_hub. The token is never part of a message.

    Args:
        repository: The id of the repository, ``user/name``.
        files: The content of each file, or a path, by its name in the repository.
        options: Visibility, message and progress.

    Raises:
        UsageError: The name is malformed, or the repository is public although ``options.public`` is False.
        DownloadError: There is no token, the hub refuses it, or the hub cannot be reached; the hint says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    repository = check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"cannot upload {repository}: HF_HUB_OFFLINE forbids requests", hint="unset HF_HUB_OFFLINE")
    check_hub_environment(constants.ENDPOINT)
    if not get_token():
        raise DownloadError(f"cannot upload {repository}: there is no token", hint=LOGIN)
    api = HfApi(library_name="meteora")
    request = Request(repository, None, None, None, None, None)
    private, created = _made(api, repository, request, options)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sorted(files.items())]
    size = sum(content.stat().st_size if isinstance(content, Path) else len(content) for content in files.values())
    with options.progress.task(f"uploading {repository}", total=size, unit="B") as task, _quiet():

        def commit() -> Any:
            return api.create_commit(repository, operations, commit_message=options.message)

        done = _attempt(commit, request)
        task.update(size)
    return Uploaded(repository, str(done.oid), private, created, f"{api.endpoint}/{repository}")


def _made(api: HfApi, repository: str, request: Request, options: UploadOptions) -> tuple[bool, bool]:
    """Create the repository, or check an existing one. Returns whether it is private and whether it is new."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def look() -> Any:
        try:
            return api.repo_info(repository)
        except RepositoryNotFoundError as missing:
            if getattr(missing.response, "status_code", None) == 401:
                raise
            return None

    found = _attempt(look, request)
    if found is None:
        _attempt(lambda: api.create_repo(repository, private=not options.public, exist_ok=True), request)
        return not options.public, True
    private = bool(getattr(found, "private", False))
    if not private and not options.public:
        raise UsageError(f"{repository} is public, so everyone could read the checkpoint", hint="pass --public, or choose another name")
    return private, False


def _attempt(call: Callable[[], Any], request: Request) -> Any:
    """Call a function of huggingface_hub until it succeeds, or until another attempt cannot help."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            explained = error if isinstance(error, MeteoraError) else explain_upload(error, request)
            if attempt == ATTEMPTS or not isinstance(explained, Unreachable):
                raise explained from None
        time.sleep(0.5 * 2**attempt)
    raise AssertionError("the loop returns or raises")


def explain_upload(error: Exception, request: Request) -> MeteoraError:
    """Translate an error of huggingface_hub during an upload into one that says what to do."""
    from huggingface_hub.errors import BadRequestError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name = request.repository
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # "Error while uploading …"
        error = error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, HfHubHTTPError) and not isinstance(error, GatedRepoError):
        if status == 401:
            return DownloadError(f"cannot upload {name}: the hub does not accept the token (status 401)", hint=LOGIN)
        if status == 403:
            return DownloadError(f"cannot upload {name}: the token may not write there (status 403)", hint=LOGIN)
        if status == 404 or isinstance(error, RepositoryNotFoundError):
            return DownloadError(f"cannot upload {name}: the hub has no such user, organisation or repository", hint="check the name")
        if status in (408, 425, 429) or status >= 500:
            why = "the hub limits the number of requests" if status == 429 else f"the hub answered {status}"
            return Unreachable(f"cannot upload {name}: {why}", hint="wait a while, then run the command again; files that arrived are not sent again")
        said = first_line(error) if isinstance(error, BadRequestError) else f"the hub answered {status}"
        return DownloadError(f"cannot upload {name}: {redact(said)}")
    explained = explain(error, request)
    if isinstance(explained, Unreachable):
        text = redact(explained.message.removeprefix(f"cannot download {name}: "))
        return Unreachable(f"cannot upload {name}: {text}", hint="check the network connection and proxy, then run the command again")
    return explained


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars of huggingface_hub while the block runs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
