"""Options that several commands share, singly and in groups (:mod:`meteora_cli.option_groups`)."""

from __future__ import annotations

from dataclasses import dataclass
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
AdaptersDir = Annotated[Path | None, typer.Option("--adapters", help="Folder of the checkpoint's adapter folders, if they were moved.", show_default=False)]
RoutingT = Annotated[float | None, typer.Option("--T", help="Routing temperature T; default: the checkpoint's.", show_default=False)]
TopK = Annotated[int | None, typer.Option("--top-k", help="Adapters per token and layer; default: the checkpoint's.", show_default=False)]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantise the base model to 4 bits by bitsandbytes (requires a CUDA GPU).")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Quantise the base model to 8 bits by bitsandbytes (requires a CUDA GPU).")]
LoadedBase = Annotated[str | None, typer.Option("--base", help="Base model, if not the one that the checkpoint names.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class Speaker:
    """The model of ``meteora chat`` and ``meteora trace``, and the form of its prompts and answers."""

    checkpoint: Checkpoint = None
    base: Annotated[
        str | None, typer.Option("--base", help="Base model alone; with --checkpoint or --adapter, the base model for them.", show_default=False)
    ] = None
    adapter: Annotated[str | None, typer.Option("--adapter", help="Single adapter: a PEFT folder, or a name.", show_default=False)] = None
    adapters_dir: AdaptersDir = None
    routing_temperature: RoutingT = None
    top_k: TopK = None
    system: Annotated[str | None, typer.Option("--system", help="System text, which precedes the conversation.", show_default=False)] = None
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            callback=typed_template,
            help="Prompt template: chat, inst, raw or a text with {} for the message; default: as in training.",
            show_default=False,
        ),
    ] = None
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer in tokens.", show_default=False)] = None


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    device: Annotated[str | None, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:1 or mps.", show_default=False)] = None
    backend: Annotated[
        str | None, typer.Option("--backend", help="Implementation of the sum over adapters: auto, reference, dense or triton.", show_default=False)
    ] = None
    load_in_4bit: In4Bit = False
    load_in_8bit: In8Bit = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model's repository.")] = False


@dataclass(frozen=True)
class Remote:
    """A server that answers instead of a local model."""

    url: Annotated[str | None, typer.Option("--url", help="Address of a server that answers, such as http://127.0.0.1:8000.", show_default=False)] = None
    api_key: Annotated[str | None, typer.Option("--api-key", help="Key of the server; default: METEORA_API_KEY.", show_default=False)] = None
    served_model: Annotated[
        str | None, typer.Option("--model", help="Model of the server; default: the routed model, or the first one.", show_default=False)
    ] = None
