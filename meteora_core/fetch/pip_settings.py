"""Reads the part of pip's configuration that says where packages come from and how to reach the index."""

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
    """The part of pip's configuration that says where packages come from.

    Attributes:
        indexes: The addresses of the package indexes.
        find_links: Further pages and folders with packages.
        cert: The file or folder of trusted certificates; None means the default.
        proxy: The address of the proxy; None means that of the environment.
    """

    indexes: tuple[str, ...]
    find_links: tuple[str, ...]
    cert: str | None
    proxy: str | None


def pip_settings() -> PipSettings:
    """Return pip's configuration from its files, which are read once per process, and from ``PIP_*`` variables; by default, the public index."""
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
    """Return the output of ``pip config list`` with the given ``PIP_CONFIG_FILE``; an empty string if pip is not installed."""
    try:
        return subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _literal(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
