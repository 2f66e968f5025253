"""Module-name patterns out of a downloaded adapter_config.json, matched in bounded time.

PEFT reads ``rank_pattern``, ``alpha_pattern``, ``target_modules`` (as a string), ``exclude_modules`` (as a string) and ``layers_pattern`` as regular
expressions, and runs them by :mod:`re`, which a hostile expression keeps busy for ever. Here names that are plain are compared without an expression, and the
rest goes through :mod:`regex`, which gives up after a time, so that reading a configuration always ends. (``regex`` is installed wherever transformers is;
a linear-time engine would be one more binary dependency, and would refuse lookaheads, which occur.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import regex

from meteora_core.errors import AdapterError
from meteora_core.text import shown

SECONDS = 5.0
"""The time that all expressions of one configuration may take together."""

MAX_LENGTH = 20_000
MAX_EXPRESSIONS = 500
_SPECIAL = frozenset("\\^$.|?*+()[]{}")
_PLAIN = "list the modules by their names instead"


class Patterns:
    """Expressions of one configuration, with one allowance of time for all of them.

    Args:
        source: How errors name the configuration.
        seconds: The time that all expressions may take together.
    """

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        self.source = source
        self.left = seconds
        self._compiled: dict[str, Any] = {}

    def full(self, pattern: str, text: str) -> bool:
        """Whether the whole of ``text`` matches. Raises AdapterError for an expression that is invalid, too long, or takes too long."""
        return self._run(pattern, text)

    def tail(self, pattern: str, path: str) -> bool:
        """Whether ``path``, or what follows one of its dots, matches to its end: PEFT's rule for rank_pattern and alpha_pattern. Raises as :meth:`full`."""
        return self._run(rf"(?:.*\.)?(?:{pattern})", path)

    def _run(self, pattern: str, text: str) -> bool:
        began = time.monotonic()
        try:
            if pattern not in self._compiled:
                if len(self._compiled) >= MAX_EXPRESSIONS:
                    raise AdapterError(f"{self.source} has more than {MAX_EXPRESSIONS} regular expressions", hint=_PLAIN)
                self._compiled[pattern] = self._compile(pattern)
            found = self._compiled[pattern].fullmatch(text, timeout=max(self.left, 1e-3))
        except TimeoutError as slow:
            raise AdapterError(f"{self.source}: the regular expression {shown(pattern)} takes too long to match", hint=_PLAIN) from slow
        self.left -= time.monotonic() - began
        return found is not None

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > MAX_LENGTH:
            raise AdapterError(f"{self.source} has a regular expression of {len(pattern)} characters; the longest that is read has {MAX_LENGTH}", hint=_PLAIN)
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, ValueError) as broken:
            raise AdapterError(f"{self.source}: {shown(pattern)} is not a regular expression: {broken}", hint=_PLAIN) from broken


class PatternTable:
    """A ``rank_pattern`` or ``alpha_pattern``: the value of the first key that matches the end of a module's path.

    Args:
        entries: Pattern -> value, in the file's order.
        patterns: Runs those that are not plain names.
    """

    def __init__(self, entries: Mapping[str, float], patterns: Patterns) -> None:
        self._patterns = patterns
        self._values = list(entries.values())
        self._exact: dict[tuple[str, bool], int] = {}
        self._dotted: dict[int, list[tuple[int, str, bool]]] = {}
        self._expressions: list[tuple[int, str]] = []
        for place, key in enumerate(entries):
            plain = _plain(key)
            if plain is None:
                self._expressions.append((place, key))
                continue
            text, wild, anchored = plain
            self._exact.setdefault((text, anchored), place)
            if wild:
                self._dotted.setdefault(len(text), []).append((place, text, anchored))

    def get(self, path: str, default: float) -> float:
        """The value for a module's path, or ``default``. Raises AdapterError as :meth:`Patterns.tail`."""
        best = len(self._values)
        for suffix in _suffixes(path):
            whole = len(suffix) == len(path)
            best = min(best, self._exact.get((suffix, False), best), self._exact.get((suffix, True), best) if whole else best)
            for place, text, anchored in self._dotted.get(len(suffix), ()):
                if place >= best:
                    break
                if (whole or not anchored) and _alike(text, suffix):
                    best = place
                    break
        for place, key in self._expressions:
            if place >= best:
                break
            if self._patterns.tail(key, path):
                best = place
                break
        return self._values[best] if best < len(self._values) else default


def _suffixes(path: str) -> list[str]:
    """``a.b.c``, ``b.c`` and ``c``."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _alike(pattern: str, text: str) -> bool:
    """Whether two texts of equal length are the same where the pattern has no dot; a dot stands for any character."""
    return all(ours in (theirs, ".") for ours, theirs in zip(pattern, text, strict=True))


def _plain(key: str) -> tuple[str, bool, bool] | None:
    """A key that is a name and no expression: the name, whether one of its dots stands for any character, and whether it is anchored by ``^``."""
    anchored = key.startswith("^")
    key = key.removeprefix("^").removesuffix("$")
    if not _SPECIAL.intersection(key.replace(".", "")):
        return key, "." in key, anchored
    bare = key.replace("\\.", "").replace("\\_", "").replace("\\-", "")
    if not _SPECIAL.intersection(bare):  # a dot that is left here is not escaped, so it is special too
        return key.replace("\\", ""), False, anchored
    return None
