"""The part of pip's configuration that says where packages come from, and how they are reached."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

PUBLIC_INDEX = "https://pypi.org/simple"


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
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
