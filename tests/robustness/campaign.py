"""Makes cases from a seed and a number, runs them, and judges the results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from . import kinds_data, kinds_leftovers, kinds_living, kinds_models, kinds_names, kinds_settings, kinds_variants
from .cases import Case, Kind, plain
from .forks import Outcome, run
from .reference import Unknown
from .world import build_world, copy_world

KINDS: dict[str, Kind] = {
    "adapter": kinds_models.adapter,
    "checkpoint": kinds_models.checkpoint,
    "authors": kinds_models.authors,
    "base": kinds_models.base,
    "rows": kinds_data.rows,
    "manifest": kinds_data.manifest,
    "results": kinds_data.results,
    "archive": kinds_data.archive,
    "toml": kinds_settings.toml,
    "environment": kinds_settings.environment,
    "numbers": kinds_settings.numbers,
    "names": kinds_names.names,
    "texts": kinds_names.texts,
    "network": kinds_names.network,
    "leftovers": kinds_leftovers.leftovers,
    "variants": kinds_variants.variants,
    "living": kinds_living.living,
}
WEIGHTS = {"adapter": 5, "checkpoint": 5, "authors": 2, "rows": 3, "names": 2, "numbers": 2, "texts": 2, "variants": 2, "living": 2}
"""How often a kind comes, where it is not once."""

SCHEDULE = [kind for round_ in range(5) for kind in KINDS if WEIGHTS.get(kind, 1) > round_]

SECRET = b"hunter2"
_PAINT = re.compile(r"\x1b\[(?!31;5m)[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\x1b\[2K|\r(?!PWN)")
"""What Rich itself sends to a terminal: colours, the cursor, lines drawn anew."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LEFT = re.compile(r"\.(tmp|old|part|partial)$|^tmp|\.tmp\.|^\.(launch|zero)")


@dataclass
class Verdict:
    """One case and what was wrong with it."""

    number: int
    kind: str
    case: Case
    outcome: Outcome
    faults: list[str]

    @property
    def classes(self) -> list[str]:
        """The faults without their details."""
        return [fault.partition(":")[0] for fault in self.faults]


@dataclass
class Campaign:
    """A world, and a folder in which copies of it are made."""

    seed: int
    root: Path
    kinds: tuple[str, ...] = ()
    schedule: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = [kind for kind in SCHEDULE if not self.kinds or kind in self.kinds]
        self.world = self.root / "world"
        build = run([], self.root, prepare=lambda: _build(self.world))
        if not (self.world / "done").exists():
            raise RuntimeError(f"the world could not be built:\n{build.said}")
        argv = ["--quiet", "eval", "--task", "alpha,beta", "--model", "base", "--base", "base", "--limit", "2", "--max-new-tokens", "3", "--out", "results"]
        self._run(argv)
        shutil.rmtree(self.world / "cache", ignore_errors=True)
        if "leftovers" in self.schedule:
            self._stop_commands()
        self._before = snapshot(self.world)

    def _run(self, argv: list[str], prepare: Callable[[], None] | None = None, *, killed: bool = False) -> None:
        done = run(argv, self.world, prepare=prepare)
        if done.code != (-9 if killed else 0):
            raise RuntimeError(f"the world could not be made: {argv[0]} ended with {done.code}:\n{done.said}")

    def _stop_commands(self) -> None:
        """Keep what a training and an evaluation leave when they are killed, and what they make when they are not."""
        from .chaos import killed_at

        for argv in (kinds_leftovers.GATES, kinds_leftovers.EVAL):
            self._run(argv)
        with _inside(self.world):
            expected = kinds_leftovers.essence()
            for name in ("runs/new", "out", "cache"):
                shutil.rmtree(name)
            self._run(kinds_leftovers.GATES, killed_at(9, False), killed=True)
            self._run(kinds_leftovers.EVAL, killed_at(0, False), killed=True)
            kinds_leftovers.STOPPED.mkdir()
            (kinds_leftovers.STOPPED / "expected.json").write_text(json.dumps(expected))
            shutil.move("out", kinds_leftovers.STOPPED / "out")
            shutil.move("cache", kinds_leftovers.STOPPED / "cache")
            (kinds_leftovers.STOPPED / "runs").mkdir()
            for path in [path for path in Path("runs").iterdir() if path.name != "meteora"]:
                shutil.move(path, kinds_leftovers.STOPPED / "runs" / path.name)

    def run_case(self, number: int, *, keep: bool = False) -> Verdict:
        """Make, run and judge case ``number``."""
        kind = self.schedule[number % len(self.schedule)]
        rng = Random(f"{self.seed}/{number}/{kind}")
        sandbox = self.root / f"case-{number}"
        place = sandbox / "work"
        sandbox.mkdir()
        copy_world(self.world, place)
        (place / "tmp").mkdir()
        (sandbox / "outside").write_text("untouched")
        try:
            with _inside(place):
                case = KINDS[kind](rng)
                case = replace(case, terminal=case.terminal and not case.as_json)
                before = snapshot(sandbox)
                environment = {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_CONFIG_FILE": os.devnull, **case.environment}
                outcome = run(case.argv, place, environment=environment, stdin=case.stdin, terminal=case.terminal)
                faults = judge(case, outcome, before, snapshot(sandbox))
        finally:
            if not keep:
                shutil.rmtree(sandbox, ignore_errors=True)
        return Verdict(number, kind, case, outcome, faults)

    def run_all(self, numbers: Iterable[int], on_verdict: Callable[[Verdict], None] | None = None) -> list[Verdict]:
        """Run many cases; at the end the world itself must be as it was."""
        verdicts = []
        for number in numbers:
            verdicts.append(self.run_case(number))
            if on_verdict is not None:
                on_verdict(verdicts[-1])
        if snapshot(self.world) != self._before:
            raise RuntimeError("a case changed the world outside its own copy")
        return verdicts


def _build(world: Path) -> None:
    build_world(world)
    (world / "done").write_text("")
    raise SystemExit(0)


@contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def snapshot(root: Path) -> dict[str, str]:
    """Every path below ``root`` with a word for what is there: hash, link's target, or kind."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            if stat.S_ISREG(state.st_mode):
                word = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(state.st_mode):
                word = f"link to {path.readlink()}"
            else:
                word = stat.filemode(state.st_mode)[0]
            found[path.relative_to(root).as_posix()] = word
    return found


_LIBRARIES = re.compile(r"^Ignored unknown kwarg option .*\n", re.M)
"""Lines that the compiled code of the library ``tokenizers`` prints on stdout, past Python."""


def judge(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is wrong with an outcome, in words; the part before a colon is the same for all faults of a kind."""
    faults = []
    out, err = outcome.out.decode("utf-8", "replace"), outcome.said
    if outcome.hung:
        faults.append(f"hang: after {outcome.seconds:.0f} s of computing")
        return faults
    if "Traceback (most recent call last)" in err or outcome.code in (70, 71):
        last = [line for line in err.strip().splitlines() if line.strip()][-1:]
        faults.append(f"traceback: {plain(last[0])[:160] if last else ''}")
    elif outcome.code < 0:
        faults.append(f"killed: by signal {-outcome.code}")
    elif outcome.code not in (0, 1, 2):
        faults.append(f"exit code: {outcome.code}")
    elif outcome.code:
        faults += _refusal(err if not case.terminal else _PAINT.sub("", err), outcome.code)
    for name, text in (("stdout", out), ("stderr", err)):
        if found := _CONTROL.search(_PAINT.sub("", text) if case.terminal else text):
            faults.append(f"raw control character: {found[0]!a} on {'the terminal' if case.terminal else name}")
    if SECRET in outcome.out or SECRET in outcome.err:
        faults.append("password: printed")
    if outcome.code == 0 and case.expect == "fail":
        faults.append(f"accepted: {case.why}")
    if outcome.code and case.expect == "pass":
        faults.append(f"refused: {case.why}")
    if outcome.code == 0:
        faults += _success(case, outcome)
    elif _LIBRARIES.sub("", out) and case.as_json and outcome.code in (1, 2) and case.argv[:2] != ["data", "verify"]:
        faults.append("stdout: something stands there after an error")
    return faults + _files(case, outcome, before, after)


def _refusal(err: str, code: int) -> list[str]:
    lines = err.rstrip("\n").split("\n")
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if "Usage: meteora" in err and code == 2 and not errors:
        return []
    if len(errors) != 1:
        return [f"error line: there are {len(errors)}"]
    behind = lines[errors[0] + 1 :]
    if len(behind) > 1 or (behind and not behind[0].startswith("hint: ")):
        return [f"error line: it is followed by {plain(behind[0])[:80]}"]
    if len(lines[errors[0]]) > 4300:
        return ["error line: longer than 4,300 characters"]
    return []


def _success(case: Case, outcome: Outcome) -> list[str]:
    faults = []
    if case.as_json:
        try:
            json.loads(outcome.out, parse_constant=_no_constant)
        except ValueError as broken:
            return [f"json: {broken}"]
    if case.check is not None:
        try:
            wrong = case.check(outcome)
        except Unknown:
            wrong = None
        except Exception as broken:
            wrong = f"what it wrote cannot be read: {type(broken).__name__}: {broken}"
        if wrong:
            faults.append(f"wrong: {plain(wrong)[:300]}")
    return faults


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} in the document")


def _files(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
    faults = []
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    for path in changed:
        if path not in after and any(_LEFT.search(part) for part in Path(path).parts):
            continue  # the remains of a killed command were removed, as they should be
        inner = path.removeprefix("work/")
        allowed = any(inner == place or inner.startswith(f"{place}/") or place.startswith(f"{inner}/") for place in case.writes)
        if path == "work" or inner.partition("/")[0] in ("cache", "home"):
            if _LEFT.search(Path(inner).name):
                faults.append(f"left behind: {plain(inner)}")
        elif inner.startswith("tmp/") or _LEFT.search(Path(inner).name):
            faults.append(f"left behind: {plain(inner)}")
        elif not allowed:
            faults.append(f"written elsewhere: {plain(inner)}")
        elif outcome.code and path in after and after[path] != "d" and not any(part.startswith(".") for part in Path(inner).parts):
            faults.append(f"half done: {plain(inner)} after an error")
    return faults[:3]


@dataclass
class Report:
    """Counts of a campaign."""

    seed: int
    cases: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    strict: list[dict[str, Any]] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self.cases[verdict.kind] += 1
        self.refused[verdict.kind] += verdict.outcome.code != 0
        self.seconds[verdict.kind] += verdict.outcome.seconds  # type: ignore[assignment]
        entry = {
            "case": verdict.number,
            "kind": verdict.kind,
            "changed": plain(verdict.case.label),
            "command": [plain(word)[:80] for word in verdict.case.argv],
            "faults": verdict.faults,
            "code": verdict.outcome.code,
            "said": plain(verdict.outcome.said[-600:]),
        }
        if verdict.faults:
            self.faults.update(set(verdict.classes))
            self.failures.append(entry)
        elif verdict.outcome.code and verdict.case.expect == "either" and verdict.case.check is not None:
            self.strict.append(entry)

    def table(self) -> str:
        """The counts, a line a kind."""
        lines = [f"{'kind':<12} {'cases':>6} {'refused':>8} {'faults':>7} {'seconds':>8}"]
        bad = Counter(failure["kind"] for failure in self.failures)
        lines += [f"{kind:<12} {count:>6} {self.refused[kind]:>8} {bad[kind]:>7} {self.seconds[kind]:>8.1f}" for kind, count in sorted(self.cases.items())]
        lines.append(f"{'all':<12} {sum(self.cases.values()):>6} {sum(self.refused.values()):>8} {len(self.failures):>7} {self.seconds.total():>8.1f}")
        lines += [f"  {fault}: {count}" for fault, count in self.faults.most_common()]
        return "\n".join(lines)


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, away from the repository."""
    with tempfile.TemporaryDirectory(prefix="meteora-robustness-") as folder:
        yield Path(folder).resolve()
