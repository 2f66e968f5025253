"""Names of checkpoints and adapters on the Hugging Face hub, in places where a folder can be given too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meteora_core.errors import UsageError
from meteora_core.fetch.hub import HubDownload, HubOptions, download_repo
from meteora_core.files import cache_dir, locked, storage_errors
from meteora_core.progress import SILENT, Progress

SCHEME = "hf://"
"""The beginning of a name that is always one on the hub."""

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^/@]+))?(?P<folder>(?:/[^/]+)*)")
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(?P<folder>(?:/[^/]+)*)$")

ADAPTER_FILES = tuple(
    pattern
    for name in ("adapter_model.safetensors", "adapter_config.json", "meteora_training.json", "gate_stats.safetensors", "tokenizer*", "*.jinja")
    for pattern in (name, f"*/{name}")
)
"""Patterns of the files of adapters; a repository may hold one adapter or a folder for each of several."""


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, or a folder in it.

    Attributes:
        repository: The id of the repository, such as ``someone/adapter``.
        revision: A branch, a tag or a commit; None means the default branch.
        folder: The path of a folder in the repository; empty means the whole repository.

    Example:
        >>> from meteora_core.fetch.hub_names import HubName
        >>> HubName("someone/adapter", "main", "gsm8k").uri
        'hf://someone/adapter@main/gsm8k'
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    @property
    def uri(self) -> str:
        """The name with ``hf://``, which no path can be mistaken for."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.folder}" if self.folder else "")


def hub_name(name: str | Path) -> HubName | None:
    """Read the name of a repository.

    ``user/name`` and ``user/name@revision`` are names unless something exists at this path or ``user`` is a folder, so that a mistyped path does not
    lead to a request; ``hf://user/name@revision/folder`` is always one.

    Args:
        name: A path or a name.

    Returns:
        The name; None for a path.

    Raises:
        UsageError: The name begins with ``hf://`` and is not the id of a repository.
    """
    text = str(name)
    explicit = re.match(r"hf:/+", text)  # Path turns // into /
    match = _ID.fullmatch(text[explicit.end() :] if explicit else text)
    if explicit:
        if match is None or ".." in text.split("/"):
            raise UsageError(f"{text!r} is not a hub repository", hint=f"write {SCHEME}ORGANISATION/NAME or {SCHEME}ORGANISATION/NAME@REVISION")
    elif match is None or match["folder"] or os.path.lexists(text) or Path(text).parent.is_dir():
        return None
    return HubName(match["repository"], match["revision"], match["folder"].strip("/"))


def hub_source(folder: str | Path) -> HubName | None:
    """The name of a folder in the hub's cache, with the commit that it was fetched at; None for other folders.

    Example:
        >>> from meteora_core.fetch.hub_names import hub_source
        >>> hub_source("/cache/hub/models--someone--adapter/snapshots/0123456789abcdef0123456789abcdef01234567").uri
        'hf://someone/adapter@0123456789abcdef0123456789abcdef01234567'
    """
    match = _SNAPSHOT.search(Path(folder).resolve().as_posix())
    return HubName(f"{match['owner']}/{match['name']}", match["revision"], match["folder"].strip("/")) if match else None


def fetch_folder(name: HubName, include: Sequence[str] | None = None, *, progress: Progress = SILENT) -> Path:
    """Fetch the safetensors and configurations of a repository, or of a folder in it, into the hub's cache.

    Args:
        name: The repository.
        include: Glob patterns of the files; None means all files of an allowed kind.
        progress: The receiver of progress reports.

    Returns:
        The folder in the hub's cache.

    Raises:
        DownloadError: See :func:`meteora_core.fetch.hub.download_repo`.
        StorageError: The disk is full or not writable.
    """
    return fetched(name, include, progress=progress).path / name.folder


def fetched(name: HubName, include: Sequence[str] | None = None, *, progress: Progress = SILENT) -> HubDownload:
    """:func:`fetch_folder` with all facts about the download."""
    if include is not None and name.folder:
        include = [f"{name.folder}/{pattern}" for pattern in include]
    patterns = (f"{name.folder}/*",) if include is None and name.folder else include
    return download_repo(name.repository, HubOptions(name.revision, None if patterns is None else tuple(patterns)), progress=progress)


def adapter_folder(folder: str | Path, *, progress: Progress = SILENT) -> Path:
    """The folder of an adapter, which is fetched first if it is named by its id on the hub.

    Raises:
        DownloadError: It cannot be fetched.
    """
    name = hub_name(folder)
    return Path(folder) if name is None else fetch_folder(name, ADAPTER_FILES, progress=progress)


def adapter_label(folder: Path) -> str:
    """The name of an adapter's folder; for a whole repository in the hub's cache, the name of the repository."""
    on_hub = hub_source(folder)
    return folder.resolve().name if on_hub is None else (on_hub.folder or on_hub.repository).rpartition("/")[2]


def adapters_root(root: str | Path, *, progress: Progress = SILENT) -> Path:
    """The folder that contains the adapter folders, which is assembled first if ``root`` names repositories on the hub.

    Args:
        root: A folder; or ids of repositories on the hub and folders, separated by commas. Each holds one adapter or a folder for each of several.
        progress: The receiver of progress reports.

    Returns:
        ``root``; or a folder in Meteora's cache with a link to each adapter, named after its repository or folder.

    Raises:
        UsageError: Two adapters have the same name.
        DownloadError: A repository cannot be fetched, or holds no adapter.
        StorageError: The links cannot be created.
    """
    text = str(root)
    names = [part.strip() for part in text.split(",") if part.strip()]
    if os.path.lexists(text) or not names or (len(names) == 1 and hub_name(names[0]) is None):
        return Path(root)
    links: dict[str, Path] = {}
    for each in names:
        name = hub_name(each)
        place = Path(each) if name is None else fetch_folder(name, ADAPTER_FILES, progress=progress)
        inside = _adapters_in(place)
        if not inside:
            raise UsageError(f"{each} holds no adapter", hint="a PEFT adapter has adapter_config.json and adapter_model.safetensors")
        own = adapter_label(place)
        for key, folder in inside.items():
            label = key or own
            if label in links:
                raise UsageError(f"two adapters have the name {label!r}", hint="name repositories of adapters that have different names")
            links[label] = folder.resolve()
    digest = hashlib.sha256("\n".join(f"{label} {folder}" for label, folder in links.items()).encode()).hexdigest()[:16]
    target = cache_dir() / "adapters" / digest
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        with locked(target):
            for label, folder in links.items():
                if not (target / label).exists():
                    (target / label).unlink(missing_ok=True)
                    (target / label).symlink_to(folder, target_is_directory=True)
    return target


def _adapters_in(folder: Path) -> dict[str, Path]:
    """The folders with an ``adapter_config.json``: the folder itself under an empty name, or its ``default``, or its sub-folders by name."""
    for place in (folder, folder / "default"):
        if os.path.lexists(place / "adapter_config.json"):
            return {"": place}
    if not folder.is_dir():
        return {}
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {entry.name: found[""] for entry in inside if "" in (found := _adapters_in(entry))}
