"""Runs the command line in forked children of this process, under limits of time and memory, with everything it writes caught."""

from __future__ import annotations

import os
import pty
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY = 6 << 30
"""Most address space of a child, in bytes (torch alone maps several GB)."""

PROCESSOR_SECONDS = 20
"""A child that computes for longer is taken for one that hangs."""

WAITING_SECONDS = 60
"""A child that is there for so long and has computed for less than half of that is taken for one that waits for something that never comes."""


@dataclass(frozen=True)
class Outcome:
    """What one command did.

    Attributes:
        code: Its exit code; negative: the signal that ended it.
        out, err: What it wrote; a terminal that stands for both is in ``err``.
        hung: Whether it had to be stopped.
        seconds: Processor time.
    """

    code: int
    out: bytes
    err: bytes
    hung: bool
    seconds: float

    @property
    def said(self) -> str:
        """stderr as text."""
        return self.err.decode("utf-8", "replace")


def set_environment() -> None:
    """Keep libraries to one thread and off the network. They read this when they are first imported."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")


def import_everything() -> None:
    """Import what any command needs, so that children start at once; afterwards this process still has one thread."""
    import gc
    import importlib
    import pkgutil

    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import sacrebleu  # noqa: F401
    import torch._dynamo
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import meteora_cli
    import meteora_core

    for package in (meteora_core, meteora_cli):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__") and ".integrations" not in module.name:
                importlib.import_module(module.name)
    import typer.main

    from meteora_cli.tree import app

    built, build = typer.main.get_command(app), typer.main.get_command  # Typer builds its commands anew at every call, which takes longer than most cases
    typer.main.get_command = lambda instance: built if instance is app else build(instance)
    gc.collect()
    gc.freeze()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads are running; children cannot be forked safely")


def run(
    argv: Sequence[str],
    cwd: Path,
    *,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    terminal: bool = False,
    prepare: Callable[[], None] | None = None,
) -> Outcome:
    """Run ``meteora ARGV`` in a child.

    Args:
        argv: The arguments.
        cwd: Its working directory.
        environment: Added to this process's environment.
        stdin: What it reads.
        terminal: stdout and stderr are one terminal; else each is a pipe.
        prepare: Called in the child before the command.
    """
    ends: list[int] = []
    if terminal:
        master, slave = pty.openpty()
        outputs, reading = (slave, slave), {master: bytearray()}
        ends = [master]
    else:
        (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe()
        outputs, reading = (out_write, err_write), {out_read: bytearray(), err_read: bytearray()}
        ends = [out_read, err_read]
    in_read, in_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        for each in [*ends, in_write]:
            os.close(each)
        _child(argv, cwd, in_read, outputs, environment or {}, terminal, prepare)
    os.close(in_read)
    for each in set(outputs):
        os.close(each)
    with suppress(BrokenPipeError):
        os.write(in_write, stdin)
    os.close(in_write)
    hung = _read_all(child, reading)
    _, status, used = os.wait4(child, 0)
    for each in reading:
        os.close(each)
    texts = [bytes(reading[each]) for each in ends]
    out, err = (b"", texts[0]) if terminal else (texts[0], texts[1])
    return Outcome(os.waitstatus_to_exitcode(status), out, err, hung, used.ru_utime + used.ru_stime)


def _read_all(child: int, reading: dict[int, bytearray]) -> bool:
    """Read until every end is closed; return whether the child had to be killed."""
    began, waiting, hung = time.monotonic(), set(reading), False
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], 0.5)
        for each in ready:
            try:
                block = os.read(each, 1 << 16)
            except OSError:  # a terminal whose other side is closed
                block = b""
            if not block:
                waiting.discard(each)
            elif len(reading[each]) < 32 << 20:
                reading[each] += block
        if not ready and not hung:
            used, passed = _processor_seconds(child), time.monotonic() - began
            hung = used > PROCESSOR_SECONDS or (passed > WAITING_SECONDS and used < passed / 20)
            if hung:
                os.killpg(child, signal.SIGKILL)
        elif ready and time.monotonic() - began > WAITING_SECONDS and _processor_seconds(child) > PROCESSOR_SECONDS and not hung:
            hung = True
            os.killpg(child, signal.SIGKILL)
    return hung


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(
    argv: Sequence[str],
    cwd: Path,
    stdin: int,
    outputs: tuple[int, int],
    environment: Mapping[str, str],
    terminal: bool,
    prepare: Callable[[], None] | None,
) -> None:
    code = 70
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        os.closerange(3, 64)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS + 5, PROCESSOR_SECONDS + 6))
        os.chdir(cwd)
        os.environ.update({"METEORA_MODEL__DEVICE": "cpu", "METEORA_CACHE": str(cwd / "cache"), "HOME": str(cwd / "home"), "TMPDIR": str(cwd / "tmp")})
        os.environ.update({"COLUMNS": "200", "TERM": "xterm-256color" if terminal else "dumb", **environment})
        sys.argv = ["meteora", *argv]
        code = call(prepare)
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def call(prepare: Callable[[], None] | None = None) -> int:
    """Run ``meteora`` with ``sys.argv`` in this process, as the interpreter would; return the exit code."""
    import io
    import tempfile

    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="strict")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="strict", line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    tempfile.tempdir = None
    from meteora_cli import app, display

    display.console.__init__(stderr=True)  # type: ignore[misc]
    display.out.__init__()  # type: ignore[misc]
    try:
        if prepare is not None:
            prepare()
        app.main()
        return 0
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
