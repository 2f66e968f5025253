"""Matches the patterns of module names in a downloaded adapter_config.json in bounded time.

PEFT reads ``rank_pattern``, ``alpha_pattern``, ``target_modules`` (as a string), ``exclude_modules`` (as a string) and ``layers_pattern`` as regular
expressions and runs them by :mod:`re`, which a hostile expression can keep busy forever. This module compares plain names as strings and matches the other
patterns by :mod:`regex` with a time limit, so that reading a configuration always ends. (``regex`` is a dependency of transformers; a linear-time engine
would add a binary dependency and refuse lookaheads, which occur in practice.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import regex

from meteora_core.errors import AdapterError
from meteora_core.text import shown

SECONDS = 5.0
"""The time limit for all expressions of one configuration together, in seconds."""

MAX_LENGTH = 20_000
MAX_EXPRESSIONS = 500
_SPECIAL = frozenset("\\^$.|?*+()[]{}")
_PLAIN = "list the modules by their names instead"


class Patterns:
    """The regular expressions of one configuration, with a common time limit.

    Args:
        source: The name of the configuration in error messages.
        seconds: The time limit for all expressions together, in seconds.
    """

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        self.source = source
        self.left = seconds
        self._compiled: dict[str, Any] = {}

    def full(self, pattern: str, text: str) -> bool:
        """Whether the whole ``text`` matches. Raises AdapterError for an expression that is invalid, too long, or too slow to match."""
        return self._run(pattern, text)

    def tail(self, pattern: str, path: str) -> bool:
        """Whether ``path``, or its end after one of its dots, matches: PEFT's rule for rank_pattern and alpha_pattern. Raises the errors of :meth:`full`."""
        return self._run(rf"(?:.*\.)?(?:{pattern})", path)

    def _run(self, pattern: str, text: str) -> bool:
        began = time.monotonic()
        try:
            if pattern not in self._compiled:
                if len(self._compiled) >= MAX_EXPRESSIONS:
                    raise AdapterError(f"{self.source} has more than {MAX_EXPRESSIONS} regular expressions", hint=_PLAIN)
                self._compiled[pattern] = self._compile(pattern)
            match = self._compiled[pattern].fullmatch(text, timeout=max(self.left, 1e-3))
        except TimeoutError as slow:
            raise AdapterError(f"{self.source}: the regular expression {shown(pattern)} takes too long to match", hint=_PLAIN) from slow
        self.left -= time.monotonic() - began
        return match is not None

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > MAX_LENGTH:
            raise AdapterError(f"{self.source} has a regular expression of {len(pattern)} characters; the limit is {MAX_LENGTH}", hint=_PLAIN)
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, ValueError) as broken:
            raise AdapterError(f"{self.source}: {shown(pattern)} is not a regular expression: {broken}", hint=_PLAIN) from broken


class PatternTable:
    """A ``rank_pattern`` or ``alpha_pattern``, in which the first key that matches the end of a module's path gives the value.

    Args:
        entries: The value of each pattern, in the order of the file.
        patterns: The matcher for keys that are not plain names.
    """

    def __init__(self, entries: Mapping[str, float], patterns: Patterns) -> None:
        self._patterns = patterns
        self._values = list(entries.values())
        self._exact: dict[tuple[str, bool], int] = {}
        self._dotted: dict[int, list[tuple[int, str, bool]]] = {}
        self._expressions: list[tuple[int, str]] = []
        for position, key in enumerate(entries):
            plain = _plain(key)
            if plain is None:
                self._expressions.append((position, key))
                continue
            text, wild, anchored = plain
            self._exact.setdefault((text, anchored), position)
            if wild:
                self._dotted.setdefault(len(text), []).append((position, text, anchored))

    def get(self, path: str, default: float) -> float:
        """Return the value for a module's path, or ``default``. Raises the errors of :meth:`Patterns.tail`."""
        best = len(self._values)
        for suffix in _suffixes(path):
            whole = len(suffix) == len(path)
            best = min(best, self._exact.get((suffix, False), best), self._exact.get((suffix, True), best) if whole else best)
            for position, text, anchored in self._dotted.get(len(suffix), ()):
                if position >= best:
                    break
                if (whole or not anchored) and _alike(text, suffix):
                    best = position
                    break
        for position, key in self._expressions:
            if position >= best:
                break
            if self._patterns.tail(key, path):
                best = position
                break
        return self._values[best] if best < len(self._values) else default


def _suffixes(path: str) -> list[str]:
    """Return the path and its ends after each dot: ``a.b.c``, ``b.c`` and ``c``."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _alike(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern of equal length, in which a dot matches any character."""
    return all(ours in (theirs, ".") for ours, theirs in zip(pattern, text, strict=True))


def _plain(key: str) -> tuple[str, bool, bool] | None:
    """Return the parts of a key that is a plain name: the name, whether its dots match any character, and whether ``^`` anchors it; else None."""
    anchored = key.startswith("^")
    key = key.removeprefix("^").removesuffix("$")
    if not _SPECIAL.intersection(key.replace(".", "")):
        return key, "." in key, anchored
    bare = key.replace("\\.", "").replace("\\_", "").replace("\\-", "")
    if not _SPECIAL.intersection(bare):  # a remaining dot is unescaped, which makes the key an expression
        return key.replace("\\", ""), False, anchored
    return None
