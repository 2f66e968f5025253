"""Several processes that share one evaluation: who am I, exchange Python objects, start them.

The processes are told about each other by the environment variables of ``torch.distributed`` (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``), as ``accelerate launch`` and ``torchrun`` set them. Only rows and counts are exchanged, through Gloo, whatever the devices are.
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
    """This process's place among those that share the work.

    Attributes:
        rank: From 0; the process 0 writes results and speaks to the user.
        count: How many there are.
        local_rank: Its place on this machine, which picks its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank, in every process. Waits for all; the values must be picklable."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[Value]) -> list[Value]:
        """This process's part of a list that all of them have: every ``count``-th item, from ``rank`` on."""
        return list(items[self.rank :: self.count])


ALONE = Processes()


def join_processes() -> Processes:
    """Find out who this process is, and connect to the others if there are any.

    Raises:
        UsageError: The environment is incomplete or holds no numbers.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count <= 1:
            return ALONE
        made = Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is set, but {error} is missing or no number", hint="start several processes by `accelerate launch` or --launcher ddp"
        ) from error
    from datetime import timedelta

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return made


def leave_processes() -> None:
    """Disconnect, after the last exchange; does nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in several processes on this machine and wait for them; when one fails, the others are ended.

    Args:
        command: Program and arguments. Each process has the variables that :func:`join_processes` reads; the input is the terminal's for none.
        count: How many.

    Returns:
        0, or the exit code of the process that failed first.

    Raises:
        UsageError: ``count`` is below 1.
        MeteoraError: The program cannot be started.
    """
    if count < 1:
        raise UsageError(f"the number of processes is {count}, it must be 1 or more")
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
