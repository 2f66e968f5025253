"""What a case is: a changed copy of the world, one command, and what may come of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from . import reference
from .forks import Outcome
from .reference import Invalid, Unknown

Expect = Literal["fail", "pass", "either"]
Check = Callable[[Outcome], str | None]
"""Called after exit code 0, in the case's folder; returns what is wrong, or None."""


@dataclass(frozen=True)
class Case:
    """One command on one changed copy of the world.

    Attributes:
        label: What was changed.
        argv: The command.
        expect: ``fail``: it must be refused; ``pass``: it must succeed; ``either``: both are right, and ``check`` judges a success.
        why: Why it must be refused, or succeed.
        check: Judges what a success produced.
        writes: Paths that the command may write, relative to the copy. Whatever else changes is an error, and so is any of them after a failure.
        environment, stdin, terminal: As :func:`.forks.run` takes them.
    """

    label: str
    argv: list[str]
    expect: Expect = "either"
    why: str = ""
    check: Check | None = None
    writes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    terminal: bool = False

    @property
    def as_json(self) -> bool:
        """Whether stdout must be one JSON document."""
        return "--json" in self.argv


Kind = Callable[[Random], Case]
"""Changes the working directory, which is a copy of the world, and gives the command."""


def judged(case: Case, meaning: Callable[[], Any]) -> Case:
    """The case with the expectation that an independent reading gives: ``fail`` where it raises Invalid."""
    try:
        meaning()
    except Unknown:
        return case
    except Invalid as broken:
        return dataclasses.replace(case, expect="fail", why=str(broken))
    return case


def document(outcome: Outcome) -> Any:
    """The JSON document on stdout."""
    return json.loads(outcome.out)


def same_ids(change: Callable[[], reference.Change], prompt: str, count: int, base: Callable[[], Any] = lambda: Path("base")) -> Check:
    """Checks the token ids of a ``--json`` answer to ``prompt`` against the reference."""

    def check(outcome: Outcome) -> str | None:
        got = document(outcome)["ids"]
        expected, whole = reference.answer(base(), change(), reference.encode(prompt), count)
        got = [*got, reference.END] if whole and len(got) < len(expected) and expected[-1] == reference.END else got
        return None if got[: len(expected)] == expected and (not whole or len(got) == len(expected)) else f"answered {got}, the reference {expected}"

    return check


def same_samples(change: Callable[[], reference.Change], folder: Path, task: str, count: int) -> Check:
    """Checks saved answers of an evaluation against the reference."""

    def check(outcome: Outcome) -> str | None:
        files = sorted(folder.rglob(f"samples_{task}_*.jsonl"))
        if len(files) != 1:
            return f"{len(files)} files of samples"
        for line in files[0].read_text().splitlines():
            row = json.loads(line)
            expected, whole = reference.answer(Path("base"), change(), reference.encode(row["doc"]["prompt"]), count)
            text, got = reference.decode(expected), row["resps"][0][0]
            if got.strip() != text.strip() if whole else not got.lstrip().startswith(text.strip()):
                return f"answered {got!r}, the reference {text!r}"
        return None

    return check


def finite_numbers(value: Any) -> bool:
    """Whether no number inside is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(finite_numbers, value.values()))
    return all(map(finite_numbers, value)) if isinstance(value, list) else True


def plain(text: str) -> str:
    """A text as it can stand in a report."""
    return text.encode("unicode_escape").decode()
