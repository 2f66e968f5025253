"""Launch several training processes: build accelerate's configuration and the launch command, and run the command.

accelerate starts the processes (through torchrun) and ends all of them when one dies. The same configuration serves GPUs and CPUs: on CPUs the
processes find no GPU and communicate through gloo.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from meteora_core.errors import UsageError
from meteora_core.settings import LaunchSettings
from meteora_core.training.deepspeed_zero import check_deepspeed
from meteora_core.training.distributed import cannot_shard
from meteora_core.workers import tied

GRACE = 40.0
"""Seconds that the processes have to end by themselves after Ctrl-C (the launcher itself waits 30 s before it kills them)."""


def process_count(settings: LaunchSettings, devices: int, *, planned: bool = False) -> int:
    """The number of processes to start on all machines together.

    Args:
        settings: Launcher, number of processes and machines.
        devices: Number of usable GPUs of this machine; 0 on a CPU.
        planned: Whether the command is only printed, not started. If ``settings`` give the number of processes, this machine then need not be able to
            shard.

    Raises:
        UsageError: The number of processes is unknown, is not a multiple of the number of machines, or exceeds the available GPUs; the launcher shards
            and there are no GPUs; or DeepSpeed is not installed.
    """
    elsewhere = planned and settings.num_processes is not None
    if settings.launcher == "deepspeed" and not elsewhere:
        check_deepspeed(devices)
    if settings.launcher == "fsdp" and devices == 0 and not elsewhere:
        raise cannot_shard()
    if settings.num_processes is None and devices == 0:
        raise UsageError("the number of processes is unknown, because there are no GPUs to count", hint="pass --num-processes N")
    count = settings.num_processes or devices * settings.num_machines
    if count % settings.num_machines:
        raise UsageError(
            f"{count} processes cannot be spread evenly over {settings.num_machines} machines",
            hint="choose a multiple of the number of machines for --num-processes",
        )
    if devices and count // settings.num_machines > devices and not planned:
        raise UsageError(
            f"{count // settings.num_machines} processes on a machine with {devices} GPUs", hint="lower --num-processes: each process needs one GPU"
        )
    if settings.num_machines > 1 and settings.main_process_ip is None:
        raise UsageError("several machines need the address of machine 0", hint="pass --main-process-ip")
    if settings.machine_rank >= settings.num_machines:
        raise UsageError(f"--machine-rank {settings.machine_rank} of {settings.num_machines} machines", hint="ranks count from 0")
    return count


def launch_config(settings: LaunchSettings, processes: int, zero_file: Path | None = None) -> dict[str, Any]:
    """The content of accelerate's configuration file.

    Mixed precision is off, because the model already has its number type. FSDP is version 2 and wraps the decoder layers that the model names.

    Args:
        settings: Launcher and machines.
        processes: Number of processes on all machines together.
        zero_file: Path of DeepSpeed's configuration file.
    """
    several = settings.num_machines > 1
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}.get(settings.launcher, "MULTI_GPU"),
        "num_processes": processes,
        "num_machines": settings.num_machines,
        "machine_rank": settings.machine_rank,
        "main_process_port": settings.main_process_port if several else 0,
        "rdzv_backend": "static",
        "same_network": True,
        "mixed_precision": "no",
        "use_cpu": False,
        "debug": False,
    }
    if settings.main_process_ip:
        config["main_process_ip"] = settings.main_process_ip
    if settings.launcher == "deepspeed":
        del config["mixed_precision"]  # set in DeepSpeed's configuration file
        config["deepspeed_config"] = {"deepspeed_config_file": str(zero_file), "zero3_init_flag": False, "deepspeed_multinode_launcher": "standard"}
    if settings.launcher == "fsdp":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": settings.reshard_after_forward,
            "fsdp_offload_params": settings.cpu_offload,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        }
    return config


def launch_command(config_file: Path, arguments: Sequence[str]) -> list[str]:
    """The command that starts the processes.

    Args:
        config_file: File with the result of :func:`launch_config`.
        arguments: Command-line arguments of ``meteora`` in each process.
    """
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file), "-m", "meteora_cli.app", *arguments]


def run_command(command: Sequence[str], *, threads: int | None = None) -> int:
    """Run a launch command to its end; Ctrl-C and a request to terminate are passed on to it.

    Args:
        command: Argument list; it does not go through a shell.
        threads: Number of CPU threads of each process; None keeps the default.

    Returns:
        The exit code of the command, or 128 + the signal's number if a signal ended the command or this call (130 for Ctrl-C).
    """
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    child = subprocess.Popen(tied(command), env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            try:
                code = child.wait(timeout=GRACE if received else 1.0)
                break
            except subprocess.TimeoutExpired:
                if received:
                    with suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code
