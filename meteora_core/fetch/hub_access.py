"""Shared parts of downloads from the hub: the allowed files, the translation of errors, and the counter of bytes."""

from __future__ import annotations

import errno
import io
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from meteora_core.errors import DownloadError, MeteoraError, StorageError, UsageError
from meteora_core.progress import ProgressBar

ALLOWED: tuple[str, ...] = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*/tokenizer*", "*.model", "*.tiktoken", "*vocab.txt", "*merges.txt")
"""Patterns of the files that are fetched; pickles and code never are."""

REFUSED: tuple[str, ...] = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.distcp", "*.py", "*.pyc", "*trainer_state.json")

NETWORK_HINT = "check the network connection and proxy, or set HF_ENDPOINT to a mirror; run the command again to resume the download"


@dataclass(frozen=True)
class Request:
    """The requested files and their destination.

    Attributes:
        repository: The id of the repository.
        revision: A branch, a tag or a commit; None means the default branch.
        folder: The folder to write to; None means the hub's cache.
        cache: The folder of the hub's cache; None means the default.
        endpoint: The address of the hub; None means the default.
        include: Glob patterns of the requested files; None means all files of an allowed kind.
    """

    repository: str
    revision: str | None
    folder: str | None
    cache: str | None
    endpoint: str | None
    include: tuple[str, ...] | None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``snapshot_download``."""
        return {
            "repo_id": self.repository,
            "revision": self.revision,
            "cache_dir": self.cache,
            "local_dir": self.folder,
            "endpoint": self.endpoint,
            "library_name": "meteora",
        }

    def wants(self, name: str) -> bool:
        """Whether a file of the repository is of an allowed kind and was requested."""
        allowed = any(fnmatchcase(name, pattern) for pattern in ALLOWED) and not any(fnmatchcase(name, pattern) for pattern in REFUSED)
        inside = ".." not in name.split("/") and not name.startswith("/")
        return inside and allowed and (self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include))


class Gone(DownloadError):
    """The hub does not have the repository."""


class Unreachable(DownloadError):
    """The hub does not answer."""


def explain(error: Exception, request: Request) -> MeteoraError:
    """Translate an error of huggingface_hub into one that says what to do."""
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    while isinstance(error, DryRunError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    name = request.repository
    if isinstance(error, GatedRepoError):
        hint = f"accept its conditions on its page on the hub ({name}), then run `hf auth login` or set HF_TOKEN"
        return DownloadError(f"{name} is gated: you must accept its owners' conditions first", hint=hint)
    if isinstance(error, RepositoryNotFoundError):
        return Gone(f"the hub has no repository {name}, or it is private", hint="check the name; a private one needs `hf auth login` or HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(f"{name} has no revision {request.revision!r}", hint="write @ and a branch, a tag or a commit of the repository")
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            return DownloadError(f"the hub does not let you read {name} (status {status})", hint="run `hf auth login`, or set HF_TOKEN to a token with access")
        if status in (408, 425, 429) or status >= 500:
            return Unreachable(f"cannot download {name}: the hub answered {status}", hint=NETWORK_HINT)
        return DownloadError(f"cannot download {name}: the hub answered {status}")
    if isinstance(error, HFValidationError):
        return UsageError(f"{name!r} is not a hub repository", hint="write ORGANISATION/NAME or ORGANISATION/NAME@REVISION")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror}: {error.filename}"
        return StorageError(f"cannot store {name}: {what}", hint="free some space, or choose another disk with --to or HF_HOME")
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Unreachable(f"cannot download {name}: {text}", hint=NETWORK_HINT)


class Counter:
    """A counter of the bytes that huggingface_hub reports to its progress bars, over several attempts."""

    def __init__(self, task: ProgressBar | None) -> None:
        self.task = task
        self.before = 0
        self.done = 0
        self.lock = threading.Lock()

    def start(self, before: int) -> None:
        """Begin a new attempt, before which ``before`` bytes are complete."""
        self.before = before

    def see(self, amount: float) -> None:
        """Record that a bar of this attempt has reached ``amount`` bytes. Of several bars, the largest amount counts."""
        with self.lock:
            now = self.before + int(amount)
            if now > self.done and self.task is not None:
                self.task.update(now - self.done)
            self.done = max(self.done, now)

    def bar_class(self) -> type[Any]:
        """Return a tqdm class that draws nothing and reports to this counter."""
        from tqdm.std import tqdm  # type: ignore[import-untyped]

        counter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

            def display(self, *args: Any, **kwargs: Any) -> bool:
                return True

            def update(self, n: float | None = 1) -> bool | None:
                with counter.lock:
                    self.n += n or 0
                if self.unit == "B":
                    counter.see(self.n)
                return None

        return Bar
