"""Kills and failing writes at every step of the commands that write, and what the next run makes of it.

Each operation is run once undisturbed. Then, in fresh copies of the world, it is killed before and after every rename and fsync and at moments of
its processor time, or one of its writes fails; the command is run again, and what it leaves must be what the undisturbed run left, and nothing else.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from .campaign import _LEFT, Campaign, snapshot
from .cases import plain
from .forks import Outcome, run
from .world import copy_world

TRAIN = ["train", "--base", "base", "--max-steps", "4", "--save-steps", "1", "--log-steps", "2", "--eval-steps", "2", "--batch-size", "2", "--log-to", "none"]


@dataclass(frozen=True)
class Operation:
    """A command that writes.

    Attributes:
        name: For reports.
        argv: The command.
        again: The command that goes on after a kill.
        result: Files and folders that it makes.
        network: Whether it fetches from the campaign's server.
    """

    name: str
    argv: list[str]
    again: list[str]
    result: tuple[str, ...]
    network: bool = False


_BUILD = ["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", "archive.tar.gz"]
_ADD = ["data", "add", "mine", "--train", "raw/alpha.jsonl"]
_COMPOSITE = ["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--examples", "1", "--num-samples", "3"]
_DOWNLOAD = ["data", "build", "--task", "strategyqa", "--source", "pypi"]
_ADAPTERS = ["train", "adapters", *TRAIN[1:], "--task", "alpha,beta", "--out", "new"]
_GATES = [*TRAIN, "--out", "runs/new"]
_EVAL = ["eval", "--task", "alpha,beta", "--model", "base,own", "--base", "base", "--limit", "3", "--max-new-tokens", "3", "--batch-size", "1", "--out", "out"]
_PACK = ["ckpt", "pack", "runs/meteora", "new", "--rank", "2"]
_CONVERT = ["ckpt", "convert", "theirs", "new", "--base", "base", "--names", "alpha,beta"]

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("build", _BUILD, _BUILD, ("datasets/strategyqa",)),
        Operation("add", _ADD, _ADD, ("datasets/mine",)),
        Operation("composite", _COMPOSITE, _COMPOSITE, ("datasets/both",)),
        Operation("download", _DOWNLOAD, _DOWNLOAD, ("datasets/strategyqa", "cache/downloads/bigbench-1.0.0.tar.gz"), network=True),
        Operation("adapters", _ADAPTERS, [*_ADAPTERS, "--resume"], ("new",)),
        Operation("gates", _GATES, [*_GATES, "--resume"], ("runs/new",)),
        Operation("eval", _EVAL, _EVAL, ("out",)),
        Operation("pack", _PACK, [*_PACK, "--force"], ("new",)),
        Operation("convert", _CONVERT, [*_CONVERT, "--force"], ("new",)),
    )
}


class Counting:
    """Wraps the calls that make files final or write them; at the chosen call something happens.

    Args:
        act: Called with the number of each call (from 0), before it and after it.
    """

    def __init__(self, act: Callable[[int, bool], None], *, writes: bool = False) -> None:
        self.act, self.count = act, 0
        names = ["replace", "rename", "fsync"] + (["mkdir"] if writes else [])
        for name in names:
            setattr(os, name, self._wrapped(getattr(os, name)))
        self._exchange()
        if writes:
            opened = io.open
            io.open = builtins.open = lambda *args, **kwargs: self._writing(opened(*args, **kwargs))  # type: ignore[assignment, misc]
            self._tensors()

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            self.act(number, False)
            value = function(*args, **kwargs)
            self.act(number, True)
            return value

        return call

    def _exchange(self) -> None:
        from meteora_core import files

        if hasattr(files, "_exchange"):
            files._exchange = self._wrapped(files._exchange)

    def _writing(self, handle: Any) -> Any:
        if handle.writable() and not handle.isatty() and isinstance(getattr(handle, "name", None), str | bytes | os.PathLike | int):
            with suppress(AttributeError):
                handle.write = self._wrapped(handle.write)
        return handle

    def _tensors(self) -> None:
        import peft.peft_model
        import safetensors.torch

        save = self._wrapped(safetensors.torch.save_file)
        safetensors.torch.save_file = save
        peft.peft_model.safe_save_file = save


def _report_count(counting: Counting, file: Path) -> None:
    """At the end of the child, write how many calls there were."""
    leave = os._exit

    def ending(code: int) -> None:
        os._exit = leave  # type: ignore[assignment]
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, str(counting.count).encode())
        leave(code)

    os._exit = ending  # type: ignore[assignment]


def counted(file: Path, *, writes: bool = False) -> Callable[[], None]:
    """Counts the calls and changes nothing."""
    return lambda: _report_count(Counting(lambda number, after: None, writes=writes), file)


def killed_at(place: int, after: bool) -> Callable[[], None]:
    """Kills the process before or after its call ``place``."""

    def act(number: int, done: bool) -> None:
        if (number, done) == (place, after):
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: void(Counting(act))


def killed_after(seconds: float) -> Callable[[], None]:
    """Ends the process without a handler after so much processor time."""

    def prepare() -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))

    return prepare


def failing_at(place: int, code: int) -> Callable[[], None]:
    """Lets the call ``place`` fail, and every later one that writes too, as on a disk that is full."""
    from safetensors import SafetensorError

    def act(number: int, done: bool) -> None:
        if number >= place and not done:
            caller = sys._getframe(1).f_locals["function"]
            if "save_file" in getattr(caller, "__name__", ""):
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            raise OSError(code, os.strerror(code))

    return lambda: void(Counting(act, writes=True))


def void(value: object) -> None:
    """Drop a value."""


class _Handler(BaseHTTPRequestHandler):
    body, sha = b"", ""

    def do_GET(self) -> None:
        page = self.path.endswith("/simple/bigbench/")
        body = b'<a href="/f/bigbench-1.0.0.tar.gz#sha256=' + self.sha.encode() + b'">bigbench-1.0.0.tar.gz</a>' if page else self.body
        begin = 0
        if (wanted := self.headers.get("Range")) and not page:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        with suppress(OSError):
            for start in range(begin, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextmanager
def serving(archive: Path) -> Iterator[dict[str, str]]:
    """Serve a package index with ``archive`` on 127.0.0.1 from a process of its own; yields the environment that points there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        child = os.fork()
        if child == 0:
            try:
                _Handler.body = archive.read_bytes()
                _Handler.sha = hashlib.sha256(_Handler.body).hexdigest()
                server = ThreadingHTTPServer(("127.0.0.1", port), _Handler, bind_and_activate=False)
                server.socket.close()
                server.socket = listening
                threading.Thread(target=_until_orphaned, daemon=True).start()
                server.serve_forever()
            finally:
                os._exit(0)
    environment = {"PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "0", "no_proxy": "127.0.0.1"}
    try:
        yield environment
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _until_orphaned() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


@dataclass
class Trial:
    """One disturbance and what was wrong after it."""

    operation: str
    disturbance: str
    faults: list[str]


@dataclass
class Chaos:
    """Runs operations on copies of a campaign's world, disturbed and not."""

    campaign: Campaign
    environment: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    used: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A fresh copy of the world."""
        place = self.campaign.root / "chaos"
        shutil.rmtree(place, ignore_errors=True)
        copy_world(self.campaign.world, place)
        (place / "tmp").mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def command(self, operation: Operation, place: Path, argv: list[str], prepare: Callable[[], None] | None = None) -> Outcome:
        """Run one of the operation's commands."""
        sha = hashlib.sha256((self.campaign.world / "archive.tar.gz").read_bytes()).hexdigest()

        def ready() -> None:
            if operation.network:
                from meteora_core.data import pypi_source

                pypi_source.SDIST_SHA256 = sha
            if prepare is not None:
                prepare()

        quiet = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        return run(argv, place, environment=self.environment if operation.network else quiet, prepare=ready)

    def measure(self, operation: Operation) -> None:
        """Run the operation undisturbed, twice; keep what it makes, how many calls it has, and its processor time.

        Raises:
            RuntimeError: It fails, or its two results differ.
        """
        results = []
        counts = []
        seconds = 0.0
        for writes in (False, True):
            with self.place() as place:
                done = self.command(operation, place, operation.argv, counted(place / "tmp" / "count", writes=writes))
                if done.code:
                    raise RuntimeError(f"{operation.name} fails undisturbed: {done.said}")
                counts.append(int((place / "tmp" / "count").read_text()))
                seconds = done.seconds
                results.append(essence(place, operation.result))
        if results[0] != results[1]:
            raise RuntimeError(f"{operation.name} gives two results: {difference(*results)}")
        self.expected[operation.name] = results[0]
        self.used[operation.name] = (counts[0], counts[1], seconds)

    def trial(self, operation: Operation, disturbance: str, prepare: Callable[[], None], *, refused: bool = False) -> Trial:
        """Disturb the operation, run it again, compare.

        Args:
            operation: What to run.
            disturbance: For the report.
            prepare: Sets the disturbance up.
            refused: The disturbance is an error that the command must say in one line, not a kill.
        """
        faults = []
        with self.place() as place:
            before = snapshot(place)
            first = self.command(operation, place, operation.argv, prepare)
            if refused and first.code:
                if first.code not in (1, 2) or "Traceback" in first.said or first.said.count("error: ") != 1:
                    last = [line for line in first.said.strip().splitlines() if line.strip()][-1:]
                    faults.append(f"no one-line error: code {first.code}, {plain(' '.join(last))[:160]}")
                kept = [path for path in strays(place, before, operation) if ".states" not in path]
                faults += [f"left behind by the failure: {path}" for path in kept][:2]
            again = operation.again if first.code else operation.argv
            second = self.command(operation, place, again) if first.code else first
            if second.code:
                faults.append(f"the next run fails: {plain(second.said[-300:])}")
            else:
                found = essence(place, operation.result)
                if found != self.expected[operation.name]:
                    faults.append(f"another result: {difference(self.expected[operation.name], found)}")
                faults += [f"left behind: {path}" for path in strays(place, before, operation)][:2]
        self.counts[operation.name] += 1
        return Trial(operation.name, disturbance, faults)

    def kills(self, operation: Operation, moments: int, rng: Random, *, every: int = 1) -> Iterator[Trial]:
        """Kill it before and after every (or every so many) rename and fsync, and at random moments."""
        calls, _, seconds = self.used[operation.name]
        for place in range(rng.randrange(every), calls, every):
            for after in (False, True):
                yield self.trial(operation, f"killed {'after' if after else 'before'} call {place} of {calls}", killed_at(place, after))
        for _ in range(moments):
            moment = rng.uniform(0, seconds)
            yield self.trial(operation, f"killed at {moment:.3f} s of {seconds:.3f} s", killed_after(moment))

    def failures(self, operation: Operation, number: int, rng: Random) -> Iterator[Trial]:
        """Let writes fail from a call on, as on a full or a broken disk."""
        calls = self.used[operation.name][1]
        for place in sorted(rng.sample(range(calls), min(number, calls))):
            code = rng.choice([errno.ENOSPC, errno.EIO])
            yield self.trial(operation, f"{errno.errorcode[code]} from call {place} of {calls}", failing_at(place, code), refused=True)


def essence(place: Path, result: tuple[str, ...]) -> dict[str, str]:
    """What an operation made: file to hash, without what differs between two runs by nature (times of day and durations)."""
    found = {}
    for name in result:
        root = place / name
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            relative = path.relative_to(place).as_posix()
            if path.name.endswith(".lock"):
                continue
            if path.suffix == ".json":
                raw = json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True).encode()
            else:
                raw = path.read_bytes()
            found[_undated(relative)] = hashlib.sha256(raw).hexdigest()
    return found


def _undated(name: str) -> str:
    import re

    return re.sub(r"\d{4}-\d\d-\d\dT[\d-]+", "TIME", name)


_TIMES = {"seconds", "date", "tokens_per_second", "total_evaluation_time_seconds", "start_time", "end_time", "speed", "rows_per_second", "resumed_rows", "eta"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [_timeless(each) for each in value]
    return _undated(value) if isinstance(value, str) else value


def difference(one: dict[str, str], other: dict[str, str]) -> str:
    """The files in which two results differ."""
    return ", ".join(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))[:5])


def strays(place: Path, before: dict[str, str], operation: Operation) -> list[str]:
    """Temporary files and folders that are there and were not before, and whatever else lies outside the result and the cache."""
    found = []
    for path in sorted(snapshot(place).keys() - before.keys()):
        parts = Path(path).parts
        if path in ("tmp/count", "home", "cache") or path.endswith(".lock"):
            continue
        inside = any(path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/") for name in operation.result)
        if any(_LEFT.search(part) for part in parts[1:]) or parts[0] == "tmp" or (not inside and parts[0] != "cache"):
            found.append(path)
    return found


def run_all(campaign: Campaign, moments: int, failures: int, names: tuple[str, ...], told: Callable[[Trial], None], *, every: int = 1, seed: int = 1) -> int:
    """Run the campaign of kills and failures; return how many trials there were."""
    with serving(campaign.world / "archive.tar.gz") as environment:
        chaos = Chaos(campaign, environment)
        for name in names or tuple(OPERATIONS):
            operation, rng = OPERATIONS[name], Random(f"{seed}/{name}")
            chaos.measure(operation)
            for trial in chaos.kills(operation, moments, rng, every=every):
                told(trial)
            for trial in chaos.failures(operation, failures, rng):
                told(trial)
        return chaos.counts.total()


def run_few(campaign: Campaign, told: Callable[[Trial], None]) -> int:
    """A small part of the campaign: kills around the step that makes a result final, and in the middle; return how many trials there were."""
    with serving(campaign.world / "archive.tar.gz") as environment:
        chaos = Chaos(campaign, environment)
        for name in ("add", "download", "pack", "gates"):
            operation = OPERATIONS[name]
            chaos.measure(operation)
            calls = chaos.used[name][0]
            for place, after in ((calls // 2, True), (calls - 1, False), (calls - 1, True)):
                told(chaos.trial(operation, f"killed {'after' if after else 'before'} call {place} of {calls}", killed_at(place, after)))
            place = chaos.used[name][1] // 2
            told(chaos.trial(operation, f"ENOSPC from call {place}", failing_at(place, errno.ENOSPC), refused=True))
        return chaos.counts.total()
