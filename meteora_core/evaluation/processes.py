"""Processes that share one evaluation: starting them, joining them, and exchanging Python objects.

The processes find each other by the environment variables of ``torch.distributed`` (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``), as ``accelerate launch`` and ``torchrun`` set them. They exchange only rows and counts, with Gloo on any device.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.workers import tied

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The rank of this process among those that share the work.

    Attributes:
        rank: Rank of this process, from 0. Process 0 writes results and messages.
        count: Number of processes.
        local_rank: Rank of this process on its machine, which selects its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def gather(self, value: Value) -> list[Value]:
        """Exchange one picklable value per process. Waits for all processes and returns all values, ordered by rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[Value]) -> list[Value]:
        """This process's part of a list that all processes have: every ``count``-th item, beginning with number ``rank``."""
        return list(items[self.rank :: self.count])


ALONE = Processes()


def join_processes() -> Processes:
    """Read this process's rank from the environment, and connect to the other processes if there are any.

    Raises:
        UsageError: An environment variable is missing or is not a number.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count <= 1:
            return ALONE
        processes = Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is set, but {error} is missing or not a number", hint="start several processes with `accelerate launch` or --launcher ddp"
        ) from error
    from datetime import timedelta

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return processes


def leave_processes() -> None:
    """Disconnect from the other processes after the last exchange. Does nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in several processes on this machine and wait for them. If one fails, the others are terminated.

    Each process has the environment variables that :func:`join_processes` reads, and an empty standard input.

    Args:
        command: The program and its arguments.
        count: Number of processes.

    Returns:
        0, or the exit code of the process that failed first.

    Raises:
        UsageError: ``count`` is below 1.
        MeteoraError: The program cannot be started.
    """
    if count < 1:
        raise UsageError(f"the number of processes is {count}, but must be at least 1")
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(tied(command), env=environment, stdin=subprocess.DEVNULL))
        while True:
            codes = [process.poll() for process in running]
            failed = [code for code in codes if code]
            if failed:
                return failed[0] if failed[0] > 0 else 1
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
    except OSError as error:
        raise MeteoraError(f"cannot start {command[0]}: {error.strerror or error}") from error
    finally:
        _end(running)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
