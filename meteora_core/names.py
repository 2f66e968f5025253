"""Names that become paths: which are allowed, and the check that a path stays below its root."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from meteora_core.errors import UsageError

LONGEST = 120
"""Characters in a name. File systems allow 255 bytes, and temporary files and saved states add their own prefixes and suffixes."""

KEYWORDS = frozenset({"all", "base", "own", "meteora", "peft-arrow", "singles", "composites", "bigbench", "tensorboard"})
"""Words that ``--task`` and ``--model`` understand, and folders that training writes next to adapters and checkpoints."""

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")


def problem_of(name: str) -> str | None:
    """Why ``name`` cannot name a task, an adapter or a dataset; None if it can."""
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
    """Whether ``name`` can be a name, and so a single component of a path."""
    return problem_of(name) is None


def check_name(name: str, what: str = "task") -> str:
    """Return ``name`` if it can be a name.

    Args:
        name: Letters, digits, ``_``, ``-`` and single dots inside; at most 120 characters; none of :data:`KEYWORDS`.
        what: What it names, for the message.

    Raises:
        UsageError: It cannot.
    """
    if problem := problem_of(name):
        shown = name if len(name) <= LONGEST else f"{name[:40]}…"
        raise UsageError(f"{shown!r} cannot name {_article(what)} {what}: {problem}", hint="use letters, digits, '_' and '-', for example my_task")
    return name


def check_names(names: Iterable[str], what: str = "task") -> None:
    """:func:`check_name` for each of ``names``. Raises UsageError."""
    for name in names:
        check_name(name, what)


def inside(root: Path | str, path: Path | str) -> Path:
    """Return ``path`` if it stays below ``root`` when every link on the way is followed.

    Args:
        root: A folder; it need not exist, and may be a link itself.
        path: What will be written or replaced.

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
    """The folder ``root/name``, checked by :func:`check_name` and :func:`inside`. Raises UsageError."""
    return inside(root, Path(root) / check_name(name, what))


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
