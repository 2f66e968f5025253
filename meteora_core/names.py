"""Checks of names that become paths: which names are allowed, and whether a path stays below its root."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from meteora_core.errors import UsageError

LONGEST = 120
"""The largest number of characters in a name. File systems allow 255 bytes, and temporary files and saved states add prefixes and suffixes."""

KEYWORDS = frozenset({"all", "base", "own", "meteora", "peft-arrow", "singles", "composites", "bigbench", "tensorboard"})
"""Words that ``--task`` and ``--model`` understand, and folders that training writes next to adapters and checkpoints."""

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")


def problem_of(name: str) -> str | None:
    """Return why ``name`` cannot name a task, an adapter or a dataset; None if it can."""
    if not name:
        return "it is empty"
    if len(name) > LONGEST:
        return f"it has {len(name)} characters, more than {LONGEST}"
    if not _NAME.fullmatch(name) or ".." in name:
        return "a name consists of letters, digits, '_' and '-', with single dots inside"
    if name.lower() in KEYWORDS:
        return "it is a reserved word"
    return None


def is_name(name: str) -> bool:
    """Whether ``name`` is allowed as a name, and therefore as a single component of a path."""
    return problem_of(name) is None


def check_name(name: str, what: str = "task") -> str:
    """Return ``name`` if it is allowed as a name.

    Args:
        name: A name of at most 120 letters, digits, ``_``, ``-`` and single dots inside; none of :data:`KEYWORDS`.
        what: The kind of thing that it names, for the error message.

    Raises:
        UsageError: The name is not allowed.
    """
    if problem := problem_of(name):
        shown = name if len(name) <= LONGEST else f"{name[:40]}…"
        raise UsageError(f"{shown!r} cannot name {_article(what)} {what}: {problem}", hint="use letters, digits, '_' and '-', for example my_task")
    return name


def check_names(names: Iterable[str], what: str = "task") -> None:
    """Apply :func:`check_name` to each of ``names``. Raises UsageError."""
    for name in names:
        check_name(name, what)


def inside(root: Path | str, path: Path | str) -> Path:
    """Return ``path`` if it stays below ``root`` after all links are followed.

    Args:
        root: A folder; it need not exist, and may be a link itself.
        path: The file or folder that will be written or replaced.

    Raises:
        UsageError: The path leaves the root, or its links form a loop.
    """
    root, path = Path(root), Path(path)
    try:
        top, target = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as loop:
        raise _loop(path) from loop
    if target.is_symlink():
        raise _loop(path)
    if target == top or top not in target.parents:
        raise UsageError(f"{path} is outside {root}: its links lead to {target}", hint="remove the link, or name the other folder with --out")
    return path


def _loop(path: Path) -> UsageError:
    return UsageError(f"{path} cannot be followed: its links form a loop", hint="remove the link, or choose another folder")


def folder_of(root: Path | str, name: str, what: str = "task") -> Path:
    """Return the folder ``root/name`` after :func:`check_name` and :func:`inside` have checked it. Raises UsageError."""
    return inside(root, Path(root) / check_name(name, what))


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
