"""Broken remains of commands that were stopped: states of a training, finished rows of an evaluation, tokenised rows, locks, temporary files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from .cases import Case
from .forks import Outcome
from .mutate import mutate_bytes, mutate_document, mutate_tensors

GATES = ["train", "--base", "base", "--max-steps", "3", "--save-steps", "1", "--batch-size", "2", "--log-to", "none", "--out", "runs/new"]
EVAL = ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--limit", "3", "--max-new-tokens", "3", "--batch-size", "1", "--out", "out"]
STOPPED = Path("stopped")
"""Below the world: what a killed training and a killed evaluation left, and what undisturbed ones make (``expected.json``)."""


def essence() -> dict[str, str]:
    """What the two commands made: the weights' hash, and the answers."""
    found = {}
    if (file := Path("runs/new/meteora.safetensors")).is_file():
        found["gates"] = hashlib.sha256(file.read_bytes()).hexdigest()
    for samples in Path("out").rglob("samples_*.jsonl"):
        found["answers"] = json.dumps([json.loads(line)["resps"] for line in samples.read_text().splitlines()])
    return found


def leftovers(rng: Random) -> Case:
    """A command that was stopped goes on over remains that are broken: it refuses them, or makes what an undisturbed run makes."""
    for part in ("runs", "out", "cache"):
        if (STOPPED / part).is_dir():
            shutil.copytree(STOPPED / part, part, dirs_exist_ok=True)
    expected = json.loads((STOPPED / "expected.json").read_text())
    training = rng.random() < 0.6
    if training:
        files = [path for path in (*Path("runs").glob(".new.states/*/*"), *Path("cache").rglob("*")) if path.is_file()]
    else:
        files = [path for path in Path("out").rglob(".*") if path.is_file()]
    file = rng.choice(sorted(files))
    action = rng.randrange(6)
    if action == 0:
        what = f"{file} missing"
        file.unlink()
    elif action < 3 and file.suffix == ".json":
        what = mutate_document(rng, file)
    elif action < 3 and file.suffix == ".safetensors":
        what = mutate_tensors(rng, file)
    elif action == 3:
        what = "stray files"
        for name in ("runs/.new.x8d2k1.tmp", "out/.base.tmp", "runs/.new.states/step-x", "runs/.new.states/.step-9.abc.tmp"):
            Path(name).mkdir(parents=True, exist_ok=True)
    else:
        how, raw = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(raw)
        what = f"{file}: {how}"
    if training:
        return Case(what, [*GATES, "--resume"], check=_same(expected, "gates"), writes=("runs", "out"))
    return Case(what, EVAL, check=_same(expected, "answers"), writes=("out", "runs"))


def _same(expected: dict[str, str], part: str) -> Callable[[Outcome], str | None]:
    def check(outcome: Outcome) -> str | None:
        found = essence().get(part)
        return None if found == expected[part] else f"other {part} than those of an undisturbed run"

    return check
