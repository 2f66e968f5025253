"""The options of ``meteora train adapters`` and ``meteora train gates`` that both have, grouped as their help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_core.choices import Dtype, Launcher, LogTo, LossOn

INPUT = "What to train on"
OPTIMISER = "Steps, batches and rates"
WATCHING = "Evaluation, curves and saved states"
HARDWARE = "Precision and device"
PROCESSES = "Several processes"
THIS_RUN = "This run"

Data = Annotated[Path | None, typer.Option("--data", help="Folder of the datasets.", rich_help_panel=INPUT)]
Base = Annotated[str | None, typer.Option("--base", "--model", help="Base model: a known name, a folder or a hub id.", rich_help_panel=INPUT)]
Rows = Annotated[
    str | None,
    typer.Option("--rows", help="Add datasets first, as `meteora data add` does: a file, a folder or user/name on the hub.", rich_help_panel=INPUT),
]
MaxRows = Annotated[int | None, typer.Option(min=1, help="Use only the first N train rows of each task.", rich_help_panel=INPUT, show_default=False)]
LossTokens = Annotated[
    LossOn | None, typer.Option("--loss-on", help="Tokens that the language-model loss counts: all, or those of the response.", rich_help_panel=INPUT)
]

MaxSteps = Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=OPTIMISER)]
BatchSize = Annotated[int | None, typer.Option(help="Rows in one forward pass of one process.", rich_help_panel=OPTIMISER)]
Accumulation = Annotated[int | None, typer.Option(help="Forward passes in one optimiser step.", rich_help_panel=OPTIMISER)]
LearningRate = Annotated[float | None, typer.Option("--lr", "--learning-rate", help="Peak learning rate.", rich_help_panel=OPTIMISER)]
MaxLength = Annotated[int | None, typer.Option(help="Longest row, in tokens; longer ones lose the start of their prompt.", rich_help_panel=OPTIMISER)]
Packing = Annotated[bool | None, typer.Option("--packing/--no-packing", help="Put several rows into each sequence of --max-length.", rich_help_panel=OPTIMISER)]
Seed = Annotated[int | None, typer.Option(help="Seed of start values, row order and dropout.", rich_help_panel=OPTIMISER)]

EvalSteps = Annotated[int | None, typer.Option(help="Steps between held-out evaluations; the best weights are kept. 0: none.", rich_help_panel=WATCHING)]
Patience = Annotated[int | None, typer.Option(help="Stop after this many evaluations without an improvement. 0: never.", rich_help_panel=WATCHING)]
LogSteps = Annotated[int | None, typer.Option(help="Steps between log lines.", rich_help_panel=WATCHING)]
SaveSteps = Annotated[int | None, typer.Option(help="Steps between resumable states.", rich_help_panel=WATCHING)]
Curves = Annotated[LogTo | None, typer.Option("--log-to", help="Where training curves are written besides the result.", rich_help_panel=WATCHING)]

NumberType = Annotated[Dtype | None, typer.Option("--dtype", help="Number type of the base model.", rich_help_panel=HARDWARE)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=HARDWARE)]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute activations: less memory, more time.", rich_help_panel=HARDWARE),
]

Start = Annotated[
    Launcher | None,
    typer.Option("--launcher", help="ddp: a copy of the model on each device; fsdp: the model is sharded; deepspeed: ZeRO.", rich_help_panel=PROCESSES),
]
NumProcesses = Annotated[int | None, typer.Option(help="Processes over all machines; default: one per GPU.", rich_help_panel=PROCESSES)]
NumMachines = Annotated[int | None, typer.Option(help="Number of machines.", rich_help_panel=PROCESSES)]
MachineRank = Annotated[int | None, typer.Option(help="Number of this machine, from 0.", rich_help_panel=PROCESSES)]
MainProcessIp = Annotated[str | None, typer.Option(help="Address of machine 0.", rich_help_panel=PROCESSES)]
MainProcessPort = Annotated[int | None, typer.Option(help="Port on machine 0.", rich_help_panel=PROCESSES)]

Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last saved state of the same run.", rich_help_panel=THIS_RUN)]
Force = Annotated[bool, typer.Option("--force", help="Train even if the same result is there.", rich_help_panel=THIS_RUN)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=THIS_RUN)]
