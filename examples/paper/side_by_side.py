"""Runs several steps at the same time, each in a separate process, and keeps their output in log files.

A single loop starts, watches and ends the processes; there are no threads.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.paper import children
from examples.paper.engine import Engine, Part, Stopped
from examples.paper.plan import Step
from meteora_core.errors import MeteoraError
from meteora_core.files import storage_errors

POLL = 0.1
"""Time between two checks of the processes, in seconds."""

TAIL = 15
"""Number of lines at the end of a failed command's log that are printed."""


def run_side_by_side(engine: Engine, chosen: Sequence[str] = ()) -> list[str]:
    """Run all unfinished steps, like :meth:`Engine.run`, several at the same time.

    There are ``engine.jobs`` places, and each step takes as many as its weight. Steps start in the order of the file, but a step for which there is no room
    may be overtaken by a later one. With several GPUs, each command runs on one of them. After a failure, no further step starts, except for those that do
    not need the failed step if ``engine.keep_going`` is set; running steps may end. No process outlives this call.

    Args:
        engine: The steps and the records of finished ones.
        chosen: Names or stages of steps, with ``*``; empty means all.

    Returns:
        The names of the steps that were run, in the order in which they ended.

    Raises:
        UsageError: No such step.
        MeteoraError: An error of :meth:`Engine.run`. Needs that are neither selected nor finished are reported before any step starts.
        Stopped: The time of this call is over.
    """
    steps = engine.prepare(chosen)
    names = {step.name for step in steps}
    for step in steps:
        if not engine.record_file(step).is_file():
            engine.check_needs(step, [name for name in step.needs if name not in names and not engine.record_file(engine.experiment.step(name)).is_file()])
    pool = _Pool(engine, steps)
    try:
        pool.run()
    except BaseException:
        children.end_children([each.child for each in pool.running])
        raise
    return pool.ran


@dataclass
class _Running:
    """A running command of a step."""

    step: Step
    work: Generator[Part, int | None, bool]
    log: Path
    child: subprocess.Popen[bytes]
    began: float
    until: float
    gpu: str | None = None
    asked: bool = False

    def has_ended(self) -> bool:
        """Whether the process has ended. It is interrupted when its time is over, and killed if it does not end then."""
        if self.child.poll() is not None:
            return True
        now = time.monotonic()
        if now >= self.until:
            if self.asked:
                self.child.kill()
            else:
                self.child.send_signal(signal.SIGINT)
            self.asked, self.until = True, now + children.GRACE
        return False


class _Pool:
    """The waiting and the running steps."""

    def __init__(self, engine: Engine, steps: Sequence[Step]) -> None:
        self.engine = engine
        self.waiting = list(steps)
        self.running: list[_Running] = []
        self.ran: list[str] = []
        self.problem: MeteoraError | None = None
        self.lost: set[str] = set()

    def run(self) -> None:
        """Run until all steps are finished, or until one has failed and the others have ended. Raises MeteoraError, Stopped."""
        self.begin_ready()
        while self.running:
            time.sleep(POLL)
            ended = [each for each in self.running if each.has_ended()]
            for each in ended:
                self.finish(each)
            if ended:
                self.begin_ready()
        if self.problem is not None:
            raise self.problem

    def begin_ready(self) -> None:
        """Start steps whose needs are finished, in order, as long as there are places."""
        for step in list(self.waiting):
            unsettled = {each.name for each in self.waiting} | {each.step.name for each in self.running} | self.lost
            if self.is_over() or unsettled & set(step.needs):
                continue
            try:
                due = self.engine.is_due(step)
                if due and self.weight(step) > self.engine.jobs - sum(self.weight(each.step) for each in self.running):
                    continue
                self.waiting.remove(step)
                if due:
                    self.go_on(step, self.engine.parts(step), None)
            except MeteoraError as error:
                self.note(step, error)

    def is_over(self) -> bool:
        """Whether no further step may start."""
        return self.problem is not None and (isinstance(self.problem, Stopped) or not self.engine.keep_going)

    def weight(self, step: Step) -> int:
        """The number of places that a step takes."""
        return min(step.weight, self.engine.jobs)

    def least_busy_gpu(self) -> str | None:
        """The GPU whose commands have the smallest total weight, or the first of several; None unless there are at least two GPUs."""
        if len(self.engine.gpus) < 2:
            return None
        return min(self.engine.gpus, key=lambda gpu: sum(self.weight(each.step) for each in self.running if each.gpu == gpu))

    def go_on(self, step: Step, work: Generator[Part, int | None, bool], code: int | None) -> bool:
        """Start the next part of a step, given the exit code of the previous one. Returns False if there is none. Raises MeteoraError, Stopped."""
        try:
            part = work.send(code)
        except StopIteration as end:
            if end.value:
                self.ran.append(step.name)
            return False
        log = self.engine.experiment.work / "logs" / f"{step.name}.log"
        with storage_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as handle:
                handle.write(f"$ {part.shown}\n")
        self.engine.say(f"+ {step.name}: $ {part.shown}")
        with children.signals_held():
            gpu = self.least_busy_gpu()
            child, began = self.engine.start_command(part.arguments, log, gpu), time.monotonic()
            self.running.append(_Running(step, work, log, child, began, began + part.seconds, gpu))
        return True

    def finish(self, running: _Running) -> None:
        """Record a step whose process has ended, or start its next part."""
        self.running.remove(running)
        name, seconds = running.step.name, time.monotonic() - running.began
        if running.asked:
            self.engine.say(f"- {name}: stopped after {seconds:.0f} s, because its time was over; another part continues it")
        try:
            self.go_on(running.step, running.work, None if running.asked else running.child.returncode)
        except Stopped as error:
            self.note(running.step, error)
        except MeteoraError as error:
            self.engine.say("\n".join([f"- {name}: failed after {seconds:.0f} s: {error.message}; the end of {running.log}:", *tail(running.log)]))
            self.note(running.step, error)
        else:
            if not running.asked:
                self.engine.say(f"- {name}: done in {seconds:.0f} s")

    def note(self, step: Step, error: MeteoraError) -> None:
        """Record a failure. The first one is raised at the end; a failure takes precedence over the end of the time."""
        self.waiting = [each for each in self.waiting if each is not step]
        self.lost.add(step.name)
        if self.problem is None or (isinstance(self.problem, Stopped) and not isinstance(error, Stopped)):
            self.problem = error


def tail(log: Path, lines: int = TAIL) -> list[str]:
    """The last lines of a log, indented, with only the last state of a progress bar."""
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - 65536))
        text = handle.read().decode("utf-8", errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n")]
    return [f"    {line}" for line in shown[-lines:]]
