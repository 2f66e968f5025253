"""Runs ``meteora`` commands as separate processes, which have a time limit and never outlive this program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

Starter = Callable[[list[str], Path | None, str | None], "subprocess.Popen[bytes]"]
"""A function that starts ``meteora`` with arguments. Output is appended to the file, or printed if it is None. The process sees the named GPU, or all."""

GRACE = 30.0
"""Time in seconds within which a command must end after it was interrupted; otherwise, it is killed."""


def start_child(arguments: list[str], log: Path | None = None, gpu: str | None = None) -> subprocess.Popen[bytes]:
    """Start ``meteora`` with these arguments. If ``gpu`` is given, as in CUDA_VISIBLE_DEVICES, the process sees only this GPU."""
    command = [sys.executable, "-m", "meteora_cli", *arguments]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    if log is None:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL if "--json" in arguments else None, env=environment)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)


def visible_gpus() -> tuple[str, ...]:
    """The names of the GPUs that a command may see, as in CUDA_VISIBLE_DEVICES; empty if there are none."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(str(index) for index in range(count))


def run_child(arguments: list[str], seconds: float) -> int | None:
    """Run ``meteora`` with these arguments. After ``seconds``, it is interrupted as by Ctrl-C, killed if it does not end, and the result is None."""
    children = list[subprocess.Popen[bytes]]()
    try:
        with signals_held():
            children.append(start_child(arguments))
        return children[0].wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_children(children)
        return None
    except BaseException:
        end_children(children)
        raise


def end_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes as by Ctrl-C. Those that do not end within :data:`GRACE` seconds are killed; a second signal kills all of them."""
    try:
        for child in children:
            child.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE
        for child in children:
            child.wait(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        with signals_held():
            for child in children:
                child.kill()
                child.wait()


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block, so that no process is started without being recorded.

    Processes that are started in the block react to Ctrl-C even if this program ignores it, as programs in the background of a script do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in came:
            signal.raise_signal(held)
