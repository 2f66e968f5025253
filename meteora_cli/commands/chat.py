"""``meteora chat``: talk with a MeteoRA model, one adapter, or a base model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from meteora_cli.console import console, progress, settings_from


def chat(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A MeteoRA checkpoint; default: the quickstart's, else RUNS/meteora.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A bare base model (with --checkpoint or --adapter: the one to load it onto).", show_default=False)
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="One adapter alone: a PEFT folder, or a name.", show_default=False)] = None,
) -> None:
    """Talk with a model."""
    from transformers import TextStreamer

    from meteora_core.chat.speaker import load_speaker

    settings = settings_from(ctx)
    with progress(ctx) as bars:
        speaker = load_speaker(settings, checkpoint=checkpoint, base=base, adapter=adapter, progress=bars)
    console.print(speaker.title, markup=False)
    streamer = TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in sys.stdin:
        inputs = speaker.tokenizer(f"[INST] {line.strip()} [/INST]\n", return_tensors="pt")
        speaker.model.generate(**inputs.to(speaker.model.device), max_new_tokens=settings.chat.max_new_tokens, do_sample=False, streamer=streamer)
