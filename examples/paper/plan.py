"""Makes the list of steps from ``steps.toml``, which has the commands, and a sizes file, which has their numbers."""

from __future__ import annotations

import fnmatch
import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meteora_core.errors import UsageError, did_you_mean

HERE = Path(__file__).parent
STEPS_FILE = HERE / "steps.toml"

PARTS = 4
"""Largest number of commands that train adapters, each for a part of the tasks."""

SECTIONS = {"data": ("data",), "train": ("train_gates", "routing"), "train adapters": ("train_adapters",), "eval": ("eval", "routing")}
"""Sections of the settings, in addition to ``model``, that the result of a command depends on; the longest matching prefix of the command counts."""


@dataclass(frozen=True)
class Step:
    """One command of the experiment.

    Attributes:
        name: Name of the step.
        stage: Name of the stage that the step belongs to.
        command: Arguments of ``meteora``, with ``{placeholders}``.
        needs: Names of the steps that must be finished before.
        makes: Paths that the step must create, with placeholders.
        checkpoint: Checkpoint that the step reads; its base model must be the experiment's.
        hub: Whether the step needs the Hugging Face hub; it is skipped if the hub cannot be reached.
        weight: Number of places that the step takes among those that run at the same time.
    """

    name: str
    stage: str
    command: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    checkpoint: str | None = None
    hub: bool = False
    weight: int = 1

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """The command with its placeholders filled in, as an argument list."""
        return [fill(part, values, self.name) for part in shlex.split(self.command)]


@dataclass(frozen=True)
class Experiment:
    """The steps, and the values of their placeholders.

    Attributes:
        steps: The steps in the order in which they run.
        values: Values of the placeholders: numbers and folders.
        settings: The ``meteora.toml`` that every command reads, as nested dictionaries.
        roles: The evaluation for each role in the report, as ``<evaluation>/<model>``.
        titles: Title of each role in the report.
        docs: Folder of the report.
        command_seconds: Time after which a command is stopped and continued by another one, in seconds.
        name: Name of the sizes file, for messages.
        notes: Remarks about the sizes in the report.
    """

    steps: tuple[Step, ...]
    values: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    roles: dict[str, str]
    titles: dict[str, str]
    docs: Path
    command_seconds: float
    name: str
    notes: tuple[str, ...] = field(default=())

    @property
    def work(self) -> Path:
        """The folder of everything that the experiment writes."""
        return Path(self.values["work"])

    @property
    def data(self) -> Path:
        """The datasets."""
        return self.work / "datasets"

    def step(self, name: str) -> Step:
        """The step of that name. Raises UsageError."""
        found = next((step for step in self.steps if step.name == name), None)
        if found is None:
            raise UsageError(f"no step {name!r}", hint=did_you_mean(name, [step.name for step in self.steps]))
        return found

    def relevant_settings(self, step: Step) -> dict[str, Any]:
        """The settings on which the step's result depends."""
        known = max((begin for begin in SECTIONS if step.command.startswith(f"{begin} ")), key=len, default="")
        sections = ("model", *SECTIONS.get(known, ()))
        return {section: self.settings[section] for section in sections if section in self.settings}


def load_experiment(
    sizes: str | Path, *, work: Path | None = None, raw_dir: Path | None = None, base: str | None = None, device: str | None = None, docs: Path | None = None
) -> Experiment:
    """Read the steps and a sizes file.

    Args:
        sizes: Name of a sizes file here, such as ``full`` or ``toy``, or the path of another one.
        work: Folder of all files; None for that in the sizes file.
        raw_dir: Folder with raw rows of gsm8k, alpaca and news_commentary_de (``meteora data build --raw-dir``).
        base: Base model; None for that in the sizes file.
        device: Device; None for a GPU if there is one.
        docs: Folder of the report; None for that in the sizes file.

    Raises:
        UsageError: A file is missing or broken, it leaves out an unknown step, or a step needs one that does not come before it.
    """
    file = HERE / f"{sizes}.toml" if (HERE / f"{sizes}.toml").is_file() else Path(sizes)
    if not file.is_file():
        known = sorted(path.stem for path in HERE.glob("*.toml") if path != STEPS_FILE)
        raise UsageError(f"no sizes file {sizes}", hint=f"one of {', '.join(known)}, or a TOML file like them")
    table, listed = _read(file), _read(STEPS_FILE)
    folder = work or Path(table["work"])
    settings = {section: dict(values) for section, values in table.get("meteora", {}).items()}
    settings.setdefault("model", {}).update({key: value for key, value in (("base", base), ("device", device)) if value is not None})
    settings["paths"] = {"data": str(folder / "datasets"), "adapters": str(folder / "adapters"), "runs": str(folder)}
    if raw_dir is not None:
        settings.setdefault("data", {})["raw_dir"] = str(raw_dir)
    values = {**table["values"], "work": str(folder), "gates": str(folder / "gates"), "eval": str(folder / "eval"), "base": settings["model"]["base"]}
    names = [entry["name"] for entry in listed["steps"]]
    unwanted = {name: fnmatch.filter(names, name) for name in table.get("without", [])}
    if unknown := [name for name, matching in unwanted.items() if not matching]:
        raise UsageError(f"{file} leaves out {unknown[0]!r}, and there is no such step", hint=did_you_mean(unknown[0], names))
    left_out = set().union(*unwanted.values()) | ({"base"} if Path(settings["model"]["base"]).is_dir() else set())
    left_out |= {f"adapters-{part}" for part in range(len(table["values"]["tasks"].split(",")) + 1, PARTS + 1)}
    steps: list[Step] = []
    for entry in listed["steps"]:
        if entry["name"] in left_out:
            continue
        known = [each.name for each in steps]
        needs = tuple(name for need in entry.get("needs", ()) if need not in left_out for name in (fnmatch.filter(known, need) or [need]))
        step = Step(**{**entry, "needs": needs, "makes": tuple(entry.get("makes", ()))})
        missing = [name for name in step.needs if name not in known]
        if missing:
            raise UsageError(f"step {step.name} needs {', '.join(missing)}, which does not come before it")
        steps.append(step)
    return Experiment(
        tuple(steps),
        values,
        settings,
        dict(listed["roles"]),
        dict(listed["titles"]),
        docs or Path(table["docs"]),
        float(table["command_seconds"]),
        file.stem if file.parent == HERE else str(file),
        tuple(table.get("notes", ())),
    )


def fill(text: str, values: Mapping[str, Any], where: str) -> str:
    """``text`` with values for its ``{placeholders}``. Raises UsageError for an unknown placeholder."""
    try:
        return text.format_map(values)
    except KeyError as missing:
        raise UsageError(f"step {where}: nothing fills {{{missing.args[0]}}}", hint="add it to [values] of the sizes file") from missing


def settings_text(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings as TOML."""
    lines = ["# Written by examples/paper; every command of the experiment reads it."]
    for section, values in settings.items():
        lines += _table(section, values)
    return "\n".join(lines) + "\n"


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    """The lines of a table and of the tables in it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _table(f"{name}.{key}", value)
    return lines


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise UsageError(f"{file} is not valid TOML: {broken}") from broken
