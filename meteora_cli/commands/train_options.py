"""The common options of ``meteora train adapters`` and ``meteora train gates``, in the groups that their help shows."""

from __future__ import annotations

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

Data = Annotated[Path | None, typer.Option("--data", help="Folder of datasets.", rich_help_panel=INPUT)]
Base = Annotated[str | None, typer.Option("--base", "--model", help="Base model: a known name, a folder or a hub id.", rich_help_panel=INPUT)]
Rows = Annotated[
    str | None,
    typer.Option("--rows", help="Datasets to add first, as `meteora data add` does: a file, a folder or user/name on the hub.", rich_help_panel=INPUT),
]
MaxRows = Annotated[
    int | None, typer.Option(min=1, help="Number of train rows of each task to use, starting at the first.", rich_help_panel=INPUT, show_default=False)
]
LossTokens = Annotated[
    LossOn | None, typer.Option("--loss-on", help="Tokens that the language-model loss covers: all, or those of the response.", rich_help_panel=INPUT)
]

MaxSteps = Annotated[int | None, typer.Option(help="Number of optimiser steps.", rich_help_panel=OPTIMISER)]
BatchSize = Annotated[int | None, typer.Option(help="Number of rows in one forward pass, per device.", rich_help_panel=OPTIMISER)]
Accumulation = Annotated[int | None, typer.Option(help="Number of forward passes in one optimiser step.", rich_help_panel=OPTIMISER)]
LearningRate = Annotated[float | None, typer.Option("--lr", "--learning-rate", help="Peak learning rate.", rich_help_panel=OPTIMISER)]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens; longer ones lose the start of their prompt.", rich_help_panel=OPTIMISER)]
Packing = Annotated[bool | None, typer.Option("--packing/--no-packing", help="Put several rows into each sequence of --max-length.", rich_help_panel=OPTIMISER)]
Seed = Annotated[int | None, typer.Option(help="Seed of initial values, row order and dropout.", rich_help_panel=OPTIMISER)]

EvalSteps = Annotated[
    int | None, typer.Option(help="Number of steps between held-out evaluations; the best weights are kept. 0: none.", rich_help_panel=WATCHING)
]
Patience = Annotated[
    int | None, typer.Option(help="Number of held-out evaluations without an improvement after which training stops. 0: never.", rich_help_panel=WATCHING)
]
LogSteps = Annotated[int | None, typer.Option(help="Number of steps between log lines.", rich_help_panel=WATCHING)]
SaveSteps = Annotated[int | None, typer.Option(help="Number of steps between resumable states.", rich_help_panel=WATCHING)]
Curves = Annotated[LogTo | None, typer.Option("--log-to", help="Tracker for training curves.", rich_help_panel=WATCHING)]

NumberType = Annotated[Dtype | None, typer.Option("--dtype", help="Dtype of the base model.", rich_help_panel=HARDWARE)]
Device = Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=HARDWARE)]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Recompute activations in the backward pass: less memory, more time.",
        rich_help_panel=HARDWARE,
    ),
]

Start = Annotated[
    Launcher | None,
    typer.Option("--launcher", help="ddp: one copy of the model per device; fsdp: sharded model; deepspeed: ZeRO.", rich_help_panel=PROCESSES),
]
NumProcesses = Annotated[int | None, typer.Option(help="Number of processes on all machines together; default: one per GPU.", rich_help_panel=PROCESSES)]
NumMachines = Annotated[int | None, typer.Option(help="Number of machines.", rich_help_panel=PROCESSES)]
MachineRank = Annotated[int | None, typer.Option(help="Number of this machine, from 0.", rich_help_panel=PROCESSES)]
MainProcessIp = Annotated[str | None, typer.Option(help="Address of machine 0.", rich_help_panel=PROCESSES)]
MainProcessPort = Annotated[int | None, typer.Option(help="Port on machine 0.", rich_help_panel=PROCESSES)]

Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last saved state of the same run.", rich_help_panel=THIS_RUN)]
Force = Annotated[bool, typer.Option("--force", help="Train even if the same result exists.", rich_help_panel=THIS_RUN)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=THIS_RUN)]
