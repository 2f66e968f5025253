"""The common options of ``meteora train adapters`` and ``meteora train gates``, in the groups that their help shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from meteora_core.choices import Dtype, Launcher, LogTo, LossOn

INPUT = "What to train on"
OPTIMISER = "Optimisation"
WATCHING = "Evaluation, logging and saved states"
HARDWARE = "Precision and device"
PROCESSES = "Several processes"
THIS_RUN = "This run"

Base = Annotated[str | None, typer.Option("--base", "--model", help="Base model: a known name, a folder or a hub id.", rich_help_panel=INPUT)]


@dataclass(frozen=True)
class RowOptions:
    """Which rows are trained on, and which of their tokens."""

    data: Annotated[Path | None, typer.Option("--data", help="Folder of datasets.", rich_help_panel=INPUT)] = None
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="Datasets to add first, as `meteora data add` does: a file, a folder or user/name on the hub.", rich_help_panel=INPUT),
    ] = None
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Number of train rows of each task to use, starting at the first.", rich_help_panel=INPUT, show_default=False)
    ] = None
    list_rows: Annotated[
        float | None,
        typer.Option(help="Share of each task's training rows that are lists of several of its questions, with numbered answers.", rich_help_panel=INPUT),
    ] = None
    list_max: Annotated[int | None, typer.Option(help="Largest number of questions in a list.", rich_help_panel=INPUT)] = None
    loss_on: Annotated[
        LossOn | None, typer.Option("--loss-on", help="Tokens that the language-model loss covers: all, or those of the response.", rich_help_panel=INPUT)
    ] = None


@dataclass(frozen=True)
class LoopOptions:
    """The training loop: optimisation, held-out evaluations, logging, precision and device."""

    max_steps: Annotated[int | None, typer.Option(help="Number of optimiser steps.", rich_help_panel=OPTIMISER)] = None
    batch_size: Annotated[int | None, typer.Option(help="Number of rows in one forward pass, per device.", rich_help_panel=OPTIMISER)] = None
    accumulation: Annotated[int | None, typer.Option(help="Number of forward passes in one optimiser step.", rich_help_panel=OPTIMISER)] = None
    learning_rate: Annotated[float | None, typer.Option("--lr", "--learning-rate", help="Peak learning rate.", rich_help_panel=OPTIMISER)] = None
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; longer ones lose the start of their prompt.", rich_help_panel=OPTIMISER)] = None
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Put several rows into each sequence of --max-length.", rich_help_panel=OPTIMISER)
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of initial values, row order and dropout.", rich_help_panel=OPTIMISER)] = None
    eval_steps: Annotated[
        int | None, typer.Option(help="Number of steps between held-out evaluations; the best weights are kept. 0: none.", rich_help_panel=WATCHING)
    ] = None
    patience: Annotated[
        int | None, typer.Option(help="Number of held-out evaluations without an improvement after which training stops. 0: never.", rich_help_panel=WATCHING)
    ] = None
    log_steps: Annotated[int | None, typer.Option(help="Number of steps between log lines.", rich_help_panel=WATCHING)] = None
    save_steps: Annotated[int | None, typer.Option(help="Number of steps between resumable states.", rich_help_panel=WATCHING)] = None
    log_to: Annotated[LogTo | None, typer.Option("--log-to", help="Tracker for training curves.", rich_help_panel=WATCHING)] = None
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Dtype of the base model.", rich_help_panel=HARDWARE)] = None
    device: Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=HARDWARE)] = None
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Recompute activations in the backward pass: less memory, more time.",
            rich_help_panel=HARDWARE,
        ),
    ] = None


@dataclass(frozen=True)
class LaunchOptions:
    """The processes and machines of the run."""

    launcher: Annotated[
        Launcher | None,
        typer.Option("--launcher", help="ddp: one copy of the model per device; fsdp: sharded model; deepspeed: ZeRO.", rich_help_panel=PROCESSES),
    ] = None
    num_processes: Annotated[
        int | None, typer.Option(help="Number of processes on all machines together; default: one per GPU.", rich_help_panel=PROCESSES)
    ] = None
    num_machines: Annotated[int | None, typer.Option(help="Number of machines.", rich_help_panel=PROCESSES)] = None
    machine_rank: Annotated[int | None, typer.Option(help="Number of this machine, from 0.", rich_help_panel=PROCESSES)] = None
    main_process_ip: Annotated[str | None, typer.Option(help="Address of machine 0.", rich_help_panel=PROCESSES)] = None
    main_process_port: Annotated[int | None, typer.Option(help="Port on machine 0.", rich_help_panel=PROCESSES)] = None


@dataclass(frozen=True)
class ThisRun:
    """What happens to saved states, an existing result and the report."""

    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last saved state of the same run.", rich_help_panel=THIS_RUN)] = False
    force: Annotated[bool, typer.Option("--force", help="Train even if the same result exists.", rich_help_panel=THIS_RUN)] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=THIS_RUN)] = False
