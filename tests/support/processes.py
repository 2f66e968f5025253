"""Commands and other work in processes of their own.

They are forked from one process that has imported the large libraries already (:mod:`multiprocessing`'s fork server, one for each worker of the test
run), so that each starts at once instead of after seconds of imports. Everything else is as in a process that was started anew: its own working
directory, environment, standard streams, signals and exit code.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HANG = 1500
"""Seconds after which a process is taken for one that hangs. No test depends on how fast the machine is."""

_IMPORTED = [
    "accelerate",
    "datasets",
    "peft",
    "torch._dynamo",
    "torch.distributed",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "typer.rich_utils",
    "meteora_core.checkpoints.opening",
    "meteora_core.settings",
    "meteora_core.training.gates",
]
"""Nothing of the command line, whose consoles look at the environment when they are made."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_IMPORTED)


@dataclass(frozen=True)
class Ended:
    """What a process did.

    Attributes:
        code: Its exit code; negative: the signal that ended it.
        out, err: What it wrote to standard output and standard error.
    """

    code: int
    out: str
    err: str


class Running:
    """A process that was started.

    Attributes:
        pid: Its id.
    """

    def __init__(self, process: Any, streams: Path) -> None:
        self._process, self._streams = process, streams
        weakref.finalize(self, shutil.rmtree, streams, ignore_errors=True)
        self.pid: int = process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return (self._streams / "err").read_text(errors="replace")

    def wait(self, seconds: float = HANG) -> Ended:
        """Wait until it has ended, and fail if it does not."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"a process was still running after {seconds} s; it wrote:\n{self.err[-3000:]}")
        return Ended(self._process.exitcode, (self._streams / "out").read_text(errors="replace"), self.err)

    def kill(self) -> None:
        """End it by SIGKILL, if it still runs."""
        self._process.kill()
        self._process.join()


def start(work: Callable[..., object], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None, stdin: str = "") -> Running:
    """Start ``work(*arguments)`` in a process of its own.

    Args:
        work: A function at the top level of a module.
        arguments: Its arguments; they are pickled.
        folder: The working directory.
        environment: The variables that differ from this process's.
        stdin: What it reads.
    """
    streams = Path(tempfile.mkdtemp(prefix="streams-"))
    (streams / "in").write_text(stdin)
    variables = {**os.environ, **(environment or {})}
    process = _server.Process(target=_child, args=(work, arguments, folder, variables, streams))
    process.start()
    return Running(process, streams)


def run(work: Callable[..., object], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None, stdin: str = "") -> Ended:
    """Run ``work(*arguments)`` in a process of its own; see :func:`start`."""
    return start(work, *arguments, folder=folder, environment=environment, stdin=stdin).wait()


def meteora(*arguments: str) -> None:
    """The command ``meteora``, as work for :func:`start`."""
    sys.argv = ["meteora", *arguments]
    from meteora_cli.app import entry

    entry()


def side_by_side(work: Callable[..., object], arguments: Sequence[Any], *, folder: Path, environment: Mapping[str, str] | None = None) -> list[Ended]:
    """Run ``work(*arguments)`` in two processes that know of each other as those that torchrun starts do, and fail if one of them fails."""
    count = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    running = [
        start(work, *arguments, folder=folder, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})})
        for rank in range(count)
    ]
    try:
        ended = [each.wait() for each in running]
    finally:
        for each in running:
            each.kill()
    failed = [each for each in ended if each.code]
    assert not failed, failed[0].err[-3000:]
    return ended


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers that PyTorch would start anew (``torch.multiprocessing.spawn``) be forked from the process that has imported the libraries."""
    import torch.multiprocessing

    spawn = sys.modules["torch.multiprocessing.spawn"]  # the attribute of this name is a function
    real = torch.multiprocessing.start_processes

    def forked(*arguments: Any, start_method: str, **options: Any) -> Any:
        assert start_method == "spawn"
        return real(*arguments, start_method="forkserver", **options)

    monkeypatch.setattr(spawn, "start_processes", forked)


def _child(work: Callable[..., object], arguments: tuple[Any, ...], folder: Path, variables: dict[str, str], streams: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT))):
        opened = os.open(streams / name, flags | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, mode), encoding="utf-8") for number, mode in ((0, "rb"), (1, "wb"), (2, "wb")))
    sys.stderr.reconfigure(line_buffering=True)
    import torch

    torch.set_num_threads(1)
    work(*arguments)
