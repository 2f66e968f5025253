"""Processes that end when the process that started them ends, even if it is killed.

``python -m meteora_core.workers PROGRAM ...`` runs a program that the system terminates when its parent ends (on Linux).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

GRACE = 1.0
"""The time that a worker has to clean up, in seconds."""

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Make this multiprocessing worker end when its parent ends: by SIGTERM, and by SIGKILL a second later."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="follow_parent", daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Block Ctrl-C while processes are started, so that they inherit the block; a pending Ctrl-C is delivered at the end."""
    hold = hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()
    if hold:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if hold:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_processes(processes: Sequence[Any], grace: float = GRACE) -> None:
    """End multiprocessing workers: send SIGTERM to all, then kill those that still run after ``grace`` seconds."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def tied(command: Sequence[str]) -> list[str]:
    """Return a command line that runs ``command`` and terminates it when this process ends; on systems other than Linux, ``command`` itself."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():  # Linux sends the signal when the starting thread ends
        return list(command)
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def _main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # the setting survives exec
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
