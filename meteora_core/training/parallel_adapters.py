"""Training of several adapters at the same time: every worker process loads the base model on its own device and trains one task after another.

PyTorch's multiprocessing starts the workers, ends all of them if one dies, and ends them together with this process. An adapter does not depend on the
other tasks of its worker: every task starts from its own seed and leaves the base model unchanged.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from meteora_core.errors import MeteoraError
from meteora_core.model.base import load_base, load_tokenizer, locate_base, pick_device
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.job import TrainJob
from meteora_core.training.output_folders import check_targets, tidy
from meteora_core.training.single_adapter import TrainedAdapter, adapter_inputs, adapter_is_current, finished_adapter, train_adapter
from meteora_core.workers import follow_parent

PAUSE = 0.2
"""Minimum time in seconds between two reports of a worker's progress bar."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """The arguments of every worker process: the settings of each task, the base model's number type, each worker's device, and the job."""

    settings: Mapping[str, AdapterTrainSettings]
    dtype: torch.dtype
    devices: Sequence[str]
    job: TrainJob


@dataclass
class ParallelOutcome:
    """The adapters that were trained, and the tasks that failed.

    Attributes:
        done: Adapters that were trained now or before, in the order of the tasks.
        failed: The error of each task that failed.
    """

    done: list[TrainedAdapter] = field(default_factory=list)
    failed: dict[str, MeteoraError] = field(default_factory=dict)

    def check(self) -> None:
        """Raise a MeteoraError that names the tasks that failed, if any did."""
        if not self.failed:
            return
        reasons = "; ".join(f"{task}: {error.message}" for task, error in self.failed.items())
        hints = list(dict.fromkeys(error.hint for error in self.failed.values() if error.hint))
        raise MeteoraError(f"{len(self.failed)} of {len(self.failed) + len(self.done)} tasks failed: {reasons}", hint="; ".join(hints[:2]) or None)


def job_devices(wish: str, jobs: int) -> list[str]:
    """The device of each of ``jobs`` workers: the GPUs in turn if ``wish`` names no single GPU, otherwise the same device for all."""
    device = pick_device(wish)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{number % torch.cuda.device_count()}" for number in range(jobs)]
    return [str(device)] * jobs


def train_in_parallel(settings: Mapping[str, AdapterTrainSettings], job: TrainJob, *, dtype: torch.dtype, devices: Sequence[str]) -> ParallelOutcome:
    """Train one LoRA for each task, ``len(devices)`` at a time; see :func:`meteora_core.training.single_adapter.train_adapter`.

    A task that fails does not stop the others. Adapters that already exist with the same inputs are not trained again.

    Args:
        settings: The settings of each task, by name.
        job: Base model, datasets, folder of adapters.
        dtype: Number type of the base model.
        devices: The device of each worker process.

    Returns:
        The adapters that were trained, and the tasks that failed.

    Raises:
        UsageError: A task's folder contains anything other than an adapter; nothing was trained.
        MeteoraError: A worker process died (the message names its task) or could not load the base model. The other workers were stopped; their saved
            states can be resumed.
    """
    check_targets(job.out, settings, replaced=())
    outcome, finished = ParallelOutcome(), dict[str, TrainedAdapter]()
    for task, each in settings.items():
        folder = job.out / task
        if not job.force and adapter_is_current(folder, adapter_inputs(job, dtype, task, each)):
            tidy(folder, job.out / f".{task}.states", is_main=True)
            finished[task] = finished_adapter(task, folder)
    todo = [task for task in settings if task not in finished]
    check_targets(job.out, todo)
    if todo:
        locate_base(job.base, progress=job.progress)
        workers = _Workers(_Plan(settings, dtype, devices, replace(job, progress=SILENT)), todo, job.progress)
        workers.run()
        finished |= workers.done
        outcome.failed = {task: workers.failed[task] for task in todo if task in workers.failed}
    outcome.done = [finished[task] for task in settings if task in finished]
    return outcome


class _Workers:
    """The worker processes and the results that they report."""

    def __init__(self, plan: _Plan, todo: Sequence[str], progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.todo = deque(todo)
        self.running: dict[int, str] = {}
        self.done: dict[str, TrainedAdapter] = {}
        self.failed: dict[str, MeteoraError] = {}
        self.bars: dict[tuple[int, int], tuple[AbstractContextManager[ProgressBar], ProgressBar]] = {}

    def run(self) -> None:
        from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

        workers = min(len(self.plan.devices), len(self.todo))
        pipes = [Pipe() for _ in range(workers)]
        context = _start(self.plan, [theirs for _, theirs in pipes])
        numbers = {ours: number for number, (ours, _) in enumerate(pipes)}
        try:
            _hold_interrupts(False)
            for _, theirs in pipes:
                theirs.close()
            while numbers:
                for connection in wait(list(numbers), timeout=1.0):
                    assert isinstance(connection, Connection)
                    try:
                        self._take(numbers[connection], connection, connection.recv())
                    except (EOFError, OSError):
                        del numbers[connection]
                context.join(timeout=0)
            while not context.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as died:
            raise self._death(died) from died
        finally:
            _end(context.processes)
            for ours, _ in pipes:
                ours.close()
            for bar, _ in self.bars.values():
                _close(bar, well=False)

    def _take(self, number: int, connection: Connection, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "next":
            task = self.todo.popleft() if self.todo else None
            if task is not None:
                self.running[number] = task
            connection.send(task)
        elif kind == "done":
            self.done[self.running.pop(number)] = rest[0]
        elif kind == "failed":
            task = self.running.pop(number)
            self.failed[task] = MeteoraError(rest[0], hint=rest[1])
            self.progress.note(f"{task} failed: {rest[0]}")
        elif kind == "unable":
            raise MeteoraError(rest[0], hint=rest[1])
        elif kind == "note":
            self.progress.note(rest[0])
        elif kind == "open":
            bar = self.progress.task(rest[1], total=rest[2], unit=rest[3])
            self.bars[number, rest[0]] = (bar, bar.__enter__())
        elif kind == "update":
            self.bars[number, rest[0]][1].update(rest[1], total=rest[2], **rest[3])
        elif kind == "close":
            _close(self.bars.pop((number, rest[0]))[0], well=rest[1])

    def _death(self, died: Any) -> MeteoraError:
        task = self.running.get(died.error_index)
        what = f"the process that trained {task}" if task else f"worker process {died.error_index}"
        why = str(died).strip().splitlines()[-1].removeprefix(f"process {died.error_index} ")
        others = ", ".join(name for number, name in self.running.items() if number != died.error_index)
        stopped = f"; stopped: {others}" if others else ""
        return MeteoraError(f"{what} ended: {why}{stopped}", hint="if memory ran out, lower --jobs; to continue, repeat the command with --resume")


def _start(plan: _Plan, ends: Sequence[Connection]) -> Any:
    """Start the workers with Ctrl-C blocked. The caller unblocks it in this process; each worker unblocks it once it can end without a traceback."""
    from torch.multiprocessing.spawn import start_processes

    _hold_interrupts(True)
    try:
        threads = max(1, torch.get_num_threads() // len(ends))
        arguments = (plan, threads, list(ends))
        return start_processes(_work, arguments, nprocs=len(ends), join=False, daemon=True, start_method="spawn")  # type: ignore[no-untyped-call]
    except BaseException:
        _hold_interrupts(False)
        raise


def _hold_interrupts(hold: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, {signal.SIGINT})


def _end(processes: Sequence[Any]) -> None:
    """End the processes that are still running: by a request first, then by force."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _close(bar: AbstractContextManager[ProgressBar], *, well: bool) -> None:
    if well:
        bar.__exit__(None, None, None)
    else:
        failure = MeteoraError("stopped")
        with suppress(MeteoraError):
            bar.__exit__(MeteoraError, failure, None)


def _work(number: int, plan: _Plan, threads: int, ends: Sequence[Connection]) -> None:
    """Run a worker process: load the base model, then train the tasks that the main process assigns until none is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    follow_parent()
    _hold_interrupts(False)
    for index, end in enumerate(ends):
        if index != number:
            end.close()
    torch.set_num_threads(threads)
    device = torch.device(plan.devices[number])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    line = _Line(ends[number])
    try:
        model, tokenizer = load_base(plan.job.base, dtype=plan.dtype, device=device), load_tokenizer(plan.job.base)
    except MeteoraError as error:
        line.send("unable", error.message, error.hint)
        return
    while (task := line.ask()) is not None:
        try:
            done = train_adapter(model, tokenizer, task, plan.settings[task], replace(plan.job, progress=line))
        except MeteoraError as error:
            line.send("failed", error.message, error.hint)
        except Exception as error:
            _log.warning("%s failed", task, exc_info=error)
            line.send("failed", f"{type(error).__name__}: {error}", None)
        else:
            line.send("done", done)


class _Line:
    """A worker's connection to the main process; it also implements Progress."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._numbers = connection, count()

    def send(self, *message: Any) -> None:
        """Send a message to the main process; if that has ended, end this process too."""
        try:
            self._connection.send(message)
        except OSError as gone:
            raise SystemExit(1) from gone

    def ask(self) -> str | None:
        """Request the next task; None if no task is left."""
        self.send("next")
        try:
            task: str | None = self._connection.recv()
        except EOFError:
            return None
        return task

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        """Open a progress bar in the main process."""
        number = next(self._numbers)
        self.send("open", number, title, total, unit)
        bar, well = _RemoteBar(self, number), False
        try:
            yield bar
            bar.flush()
            well = True
        finally:
            self.send("close", number, well)

    def note(self, message: str) -> None:
        """Report a message through the main process."""
        self.send("note", message)


class _RemoteBar:
    def __init__(self, line: _Line, number: int) -> None:
        self._line, self._number = line, number
        self._advance, self._sent, self._fields = 0.0, 0.0, dict[str, str]()
        self._total: float | None = None

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self._advance += advance
        self._total = total if total is not None else self._total
        self._fields |= fields
        if time.monotonic() - self._sent >= PAUSE:
            self.flush()

    def flush(self) -> None:
        self._line.send("update", self._number, self._advance, self._total, self._fields)
        self._advance, self._sent = 0.0, time.monotonic()
