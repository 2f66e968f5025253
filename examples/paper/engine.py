"""Runs the steps one after another: prints each command, skips finished steps, and stops with a command for the repair if a step is out of date."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from examples.paper.children import Starter, start_child
from examples.paper.plan import PARTS, Experiment, Step, fill, settings_text
from meteora_core.data.manifest import NAME as MANIFEST
from meteora_core.data.rows import available_tasks
from meteora_core.errors import MeteoraError, UsageError
from meteora_core.files import atomic_write, sha256
from meteora_core.json_files import read_json, write_json

Runner = Callable[[list[str], float], int | None]
"""A function that runs ``meteora`` with arguments for at most a number of seconds. It returns the exit code, or None if the time was over."""

WEIGHED = ("meteora.safetensors", "adapter_model.safetensors", "meteora_config.json", MANIFEST)
"""Files in a step's result whose hashes are recorded; for an evaluation, the newest ``results_*.json``."""

MOST_PARTS = 12
"""Largest number of parts of a command; after these, it counts as making no progress."""


class Stopped(MeteoraError):
    """The time of this call is over; the same command continues."""

    exit_code = 75


@dataclass(frozen=True)
class Part:
    """A ``meteora`` command to run for at most a number of seconds; ``shown`` is the command as a user would type it."""

    arguments: list[str]
    seconds: float
    shown: str


@dataclass
class Engine:
    """The steps of an experiment, and the records of finished steps.

    Attributes:
        experiment: The experiment to run.
        call: The command line of this program, for repairs.
        run_command: Function that runs a ``meteora`` command.
        say: Function that prints a line.
        deadline: Time at which this call ends, by ``time.monotonic()``.
        hub_reachable: Function that returns whether the hub can be reached; it is called for steps that need the hub.
        jobs: Number of steps that may run at the same time; see :mod:`examples.paper.side_by_side`.
        keep_going: Whether steps that do not need a failed one still run; the failure is raised at the end.
        start_command: Function that starts a ``meteora`` command that runs at the same time as others.
        gpus: Names of the GPUs over which commands that run at the same time are distributed, each on one; if empty, the commands choose.
    """

    experiment: Experiment
    call: str
    run_command: Runner
    say: Callable[[str], None]
    deadline: float = float("inf")
    hub_reachable: Callable[[], bool] = lambda: False
    jobs: int = 1
    keep_going: bool = False
    start_command: Starter = start_child
    gpus: tuple[str, ...] = ()
    _hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The ``meteora.toml`` of the experiment."""
        return self.experiment.work / "meteora.toml"

    def record_file(self, step: Step) -> Path:
        """The file that records a finished step."""
        return self.experiment.work / "steps" / f"{step.name}.json"

    def values(self) -> dict[str, Any]:
        """The values of all placeholders: those in the sizes file, ``total_rank``, ``tasks_1`` to ``tasks_4`` (every fourth task), and ``config``."""
        values = self.experiment.values
        singles = [name for name in available_tasks(self.experiment.data) if not name.startswith("composite_")]
        parts = {f"tasks_{turn + 1}": ",".join(singles[turn::PARTS]) for turn in range(PARTS)}
        return {**values, **parts, "total_rank": int(values["rank"]) * len(singles), "config": str(self.config)}

    def command_line(self, step: Step) -> str:
        """The step's command as a user would type it."""
        return shlex.join(["meteora", *self._arguments(step)])

    def _arguments(self, step: Step) -> list[str]:
        return ["--config", str(self.config), *step.arguments(self.values())]

    def start(self) -> None:
        """Write the settings file. Raises StorageError."""
        with atomic_write(self.config) as handle:
            handle.write(settings_text(self.experiment.settings))

    def prepare(self, chosen: Sequence[str]) -> list[Step]:
        """The selected steps, after writing the settings file and checking the data. Raises UsageError, MeteoraError, StorageError."""
        steps = self.choose(chosen)
        self.start()
        self.verify_data()
        return steps

    def run(self, chosen: Sequence[str] = ()) -> list[str]:
        """Run all unfinished steps, one after another.

        Args:
            chosen: Names or stages of steps, with ``*``; empty means all.

        Returns:
            The names of the steps that were run.

        Raises:
            UsageError: No such step.
            MeteoraError: A command failed, or a finished step is out of date; the hint is the command that repairs it.
            Stopped: The time of this call is over.
        """
        ran: list[str] = []
        lost: set[str] = set()
        first: MeteoraError | None = None
        for step in self.prepare(chosen):
            if lost & set(step.needs):
                lost.add(step.name)
                continue
            try:
                if self.is_due(step) and self.execute(step):
                    ran.append(step.name)
            except MeteoraError as error:
                if isinstance(error, Stopped) or not self.keep_going:
                    raise
                self.say(f"# {step.name}: {error.message}")
                lost.add(step.name)
                first = first or error
        if first is not None:
            raise first
        return ran

    def is_due(self, step: Step) -> bool:
        """Whether the step must run, because it is not finished, although its needs are. Raises MeteoraError if a step is out of date."""
        if self.is_done(step):
            return False
        self.check_needs(step, step.needs)
        self.check_base(step)
        return True

    def check_needs(self, step: Step, needs: Iterable[str]) -> None:
        """Whether these needs of a step are finished. Raises MeteoraError."""
        for name in needs:
            if not self.is_done(self.experiment.step(name)):
                raise MeteoraError(f"step {step.name} needs step {name}, which is not done", hint=self.repair(f"--only {name}"))

    def choose(self, chosen: Iterable[str]) -> list[Step]:
        """The steps whose name or stage matches one of the patterns, in order. Raises UsageError if a pattern matches none."""
        patterns = list(chosen)
        for pattern in patterns:
            if not any(fnmatch(step.name, pattern) or fnmatch(step.stage, pattern) for step in self.experiment.steps):
                raise UsageError(f"no step or stage {pattern!r}", hint=f"there are: {', '.join(step.name for step in self.experiment.steps)}")
        return [
            step for step in self.experiment.steps if not patterns or any(fnmatch(step.name, pattern) or fnmatch(step.stage, pattern) for pattern in patterns)
        ]

    def forget(self, chosen: Iterable[str]) -> list[str]:
        """Delete the records of steps and of all steps that depend on them, so that they run again. Returns their names."""
        gone = {step.name for step in self.choose(chosen)}
        for step in self.experiment.steps:
            if gone & set(step.needs):
                gone.add(step.name)
        for name in gone:
            self.record_file(self.experiment.step(name)).unlink(missing_ok=True)
        return [step.name for step in self.experiment.steps if step.name in gone]

    def repair(self, options: str) -> str:
        """The command line of this program with the options of a repair."""
        return f"{self.call} {options}"

    def is_done(self, step: Step) -> bool:
        """Whether the step was run and nothing has changed since.

        Raises:
            MeteoraError: The step was run, but its command, settings, data or results have changed since; the hint is the command that repairs it.
        """
        file = self.record_file(step)
        if not file.is_file():
            return False
        record = read_json(file, hint=self.repair(f"--again {step.name}"))
        if record.get("left_out"):
            return True
        again = self.repair(f"--again {step.name}")
        if record["command"] != self.command_line(step):
            raise MeteoraError(f"step {step.name} was done by another command: {record['command']}", hint=again)
        if record["settings"] != self.experiment.relevant_settings(step):
            raise MeteoraError(
                f"step {step.name} was done with other settings: {_difference(record['settings'], self.experiment.relevant_settings(step))}", hint=again
            )
        changed = [name for name, known in record["data"].items() if known != self.data_hashes().get(name)]
        if changed:
            raise MeteoraError(f"step {step.name} used other rows of {', '.join(changed)}: the dataset has changed since, or no longer exists", hint=again)
        for path, known in record["outputs"].items():
            if not Path(path).is_file():
                raise MeteoraError(f"{path}, which step {step.name} created, no longer exists", hint=again)
            if self.hash_of(Path(path)) != known:
                raise MeteoraError(f"{path} is not the file that step {step.name} created: its hash differs", hint=again)
        return True

    def hash_of(self, path: Path) -> str:
        """The SHA-256 of a file, which is computed again only if the file's time or size has changed."""
        state = path.stat()
        key = (str(path), state.st_mtime_ns, state.st_size)
        if key not in self._hashes:
            self._hashes[key] = sha256(path)
        return self._hashes[key]

    def data_hashes(self) -> dict[str, str]:
        """The hash of each dataset's manifest, which contains the hashes of the rows, by dataset."""
        folder = self.experiment.data
        return {path.parent.name: self.hash_of(path) for path in sorted(folder.glob(f"*/{MANIFEST}"))}

    def uses(self, step: Step, dataset: str) -> bool:
        """Whether the result of a step depends on a dataset."""
        arguments = step.arguments(self.values())
        if arguments[0] not in ("train", "eval"):
            return False
        named = arguments[arguments.index("--task") + 1] if "--task" in arguments else "singles"
        if named in ("singles", "all"):
            return (named == "all" and arguments[0] == "eval") or not dataset.startswith("composite_")
        return dataset in named.split(",")

    def verify_data(self) -> None:
        """Run ``meteora data verify`` on the datasets that finished steps built. Raises MeteoraError."""
        made = {
            path.name: step.name for step in self.experiment.steps if step.stage == "datasets" and self.record_file(step).is_file() for path in self.makes(step)
        }
        names = [name for name in made if (self.experiment.data / name / MANIFEST).is_file()]
        if not names:
            return
        command = ["--config", str(self.config), "data", "verify", *names]
        self.say(f"$ {shlex.join(['meteora', *command])}")
        if self.run_command([*command, "--json"], self.left()) != 0:
            from meteora_core.data.catalog import verify

            broken = [report for report in verify(self.experiment.data, names) if not report.ok]
            what = "; ".join(problem for report in broken for problem in report.problems[:1]) or "`meteora data verify` failed"
            raise MeteoraError(
                f"datasets differ from what was built: {what}", hint=self.repair(f"--again {' '.join(dict.fromkeys(made[each.task] for each in broken))}")
            )

    def makes(self, step: Step) -> list[Path]:
        """The paths that a step creates; a name with commas stands for several paths in the same folder."""
        filled = [Path(fill(template, self.values(), step.name)) for template in step.makes]
        return [path.parent / name for path in filled for name in path.name.split(",")]

    def check_base(self, step: Step) -> None:
        """Check that the checkpoint that the step reads belongs to the experiment's base model. Raises MeteoraError."""
        if step.checkpoint is None:
            return
        from meteora_core.checkpoints.native import read_config

        folder = Path(fill(step.checkpoint, self.values(), step.name))
        named = read_config(folder)["base"]["name"]
        wanted = self.experiment.values["base"]
        if named not in (wanted, str(Path(wanted).absolute())):  # a checkpoint names a local base by its absolute path
            maker = next((each.name for each in self.experiment.steps if folder in self.makes(each)), step.name)
            raise MeteoraError(f"the checkpoint {folder} belongs to the base {named}, not to {wanted}", hint=self.repair(f"--again {maker}"))

    def left(self) -> float:
        """Time limit of a command in seconds: that in the sizes file, or the time up to the deadline. Raises Stopped if none is left."""
        seconds = min(self.experiment.command_seconds, self.deadline - time.monotonic())
        if seconds <= 0:
            raise Stopped("the time of this call is over", hint=f"continue with the same command: {self.call}")
        return seconds

    def execute(self, step: Step) -> bool:
        """Run a step and record it. Returns False if it was skipped. Raises MeteoraError, Stopped."""
        work, code = self.parts(step), None
        while True:
            try:
                part = work.send(code)
            except StopIteration as end:
                return bool(end.value)
            self.say(f"$ {part.shown}")
            code = self.run_command(part.arguments, part.seconds)

    def parts(self, step: Step) -> Generator[Part, int | None, bool]:
        """Run the commands of a step, as many as its time limit requires, and record the step.

        Yields:
            The next command. Its exit code must be sent back, or None if its time was over.

        Returns:
            False if the step was skipped.

        Raises:
            MeteoraError: The command failed, created nothing, or makes no progress.
            Stopped: The time of this call is over.
        """
        if step.hub and not self.hub_reachable():
            self.say(f"# {step.name}: skipped, because the hub cannot be reached (to run it later: {self.repair(f'--again {step.name}')})")
            write_json(self.record_file(step), {"step": step.name, "left_out": "the hub could not be reached"})
            return False
        arguments, shown = self._arguments(step), self.command_line(step)
        parts_file = self.record_file(step).with_suffix(".parts.json")
        state: dict[str, Any] = {"command": shown, "seconds": 0.0, "parts": 0, "jobs": self.jobs, "spans": []}
        before = read_json(parts_file) if parts_file.is_file() else state
        if before["command"] == shown:
            state |= {**before, "jobs": max(before.get("jobs", 1), self.jobs)}
        if len(self.gpus) > 1:
            state["gpus"] = max(before.get("gpus", 1), len(self.gpus))
        while True:
            limit, began, clock = self.left(), time.monotonic(), time.time()
            code = yield Part(arguments, limit, shown + (f"   # part {state['parts'] + 1}" if state["parts"] else ""))
            state["seconds"] += time.monotonic() - began
            state["parts"] += 1
            state["spans"].append({"began": round(clock, 1), "ended": round(time.time(), 1)})
            write_json(parts_file, state)
            if code == 0:
                break
            if code is None and state["parts"] >= MOST_PARTS:
                raise MeteoraError(
                    f"step {step.name} does not end in {state['parts']} parts", hint="raise command_seconds, or lower save_steps, in the sizes file"
                )
            if code is not None:
                raise MeteoraError(f"step {step.name} failed with exit code {code}", hint=f"fix the error above, then run: {self.call}")
        outputs = self.outputs(step)
        write_json(
            self.record_file(step),
            {
                "step": step.name,
                **state,
                "settings": self.experiment.relevant_settings(step),
                "seconds": round(state["seconds"], 1),
                "data": {name: known for name, known in self.data_hashes().items() if self.uses(step, name)},
                "outputs": outputs,
            },
        )
        parts_file.unlink(missing_ok=True)
        return True

    def outputs(self, step: Step) -> dict[str, str]:
        """The hash of each result of the step, by path. Raises MeteoraError if a result is missing."""
        made = {}
        for path in self.makes(step):
            found = [file for file in (path / name for name in WEIGHED) if file.is_file()]
            results = sorted(path.glob("results_*.json"), key=os.path.getmtime)
            if path.is_file():
                found = [path]
            if not (found or results):
                raise MeteoraError(f"step {step.name} ended, but created nothing in {path}", hint=self.repair(f"--again {step.name}"))
            for file in found or results[-1:]:
                made[str(file)] = sha256(file)
        return made


def _difference(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            _difference(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)
        )
    return f"{name} was {old}, is {new}"
