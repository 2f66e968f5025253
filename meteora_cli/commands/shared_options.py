"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_cli.flags import typed_template

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Checkpoint, native or in the authors' layout, or its id on the hub; default: runs/meteora, or the quickstart's, or the starter checkpoint.",
        show_default=False,
    ),
]
Base = Annotated[str | None, typer.Option("--base", help="Base model alone; with --checkpoint or --adapter, the base model for them.", show_default=False)]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Single adapter: a PEFT folder, or a name.", show_default=False)]
AdaptersDir = Annotated[Path | None, typer.Option("--adapters", help="Folder of the checkpoint's adapter folders, if they were moved.", show_default=False)]
RoutingT = Annotated[float | None, typer.Option("--T", help="Routing temperature T; default: the checkpoint's.", show_default=False)]
TopK = Annotated[int | None, typer.Option("--top-k", help="Adapters per token and layer; default: the checkpoint's.", show_default=False)]
System = Annotated[str | None, typer.Option("--system", help="System text, which precedes the conversation.", show_default=False)]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        callback=typed_template,
        help="Prompt template: chat, inst, raw or a text with {} for the message; default: as in training.",
        show_default=False,
    ),
]
MaxNew = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer in tokens.", show_default=False)]
Device = Annotated[str | None, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:1 or mps.", show_default=False)]
Backend = Annotated[
    str | None, typer.Option("--backend", help="Implementation of the sum over adapters: auto, reference, dense or triton.", show_default=False)
]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantise the base model to 4 bits by bitsandbytes (requires a CUDA GPU).")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Quantise the base model to 8 bits by bitsandbytes (requires a CUDA GPU).")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model's repository.")]
LoadedBase = Annotated[str | None, typer.Option("--base", help="Base model, if not the one that the checkpoint names.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
