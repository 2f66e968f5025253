"""``meteora ckpt push``: uploads a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_cli.commands.shared_options import AdaptersDir, AsJson
from meteora_cli.console import emit_json, progress
from meteora_cli.display import DataTable, out, put


def push(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A native checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Repository on the hub: USER/NAME. It is created if it does not exist.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everyone read a new repository; default: only its owners.")] = False,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence on the model card, such as apache-2.0.", show_default=False)] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The base model's id on the hub, if the checkpoint names a folder: ORGANISATION/NAME or ORGANISATION/NAME@REVISION.",
            show_default=False,
        ),
    ] = None,
    adapters: AdaptersDir = None,
    statistics: Annotated[bool, typer.Option("--statistics", help="Upload the statistics for `meteora adapters add` too.")] = False,
    message: Annotated[str, typer.Option("--message", help="Message of the commit.")] = "Upload a Meteora checkpoint",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and show the model card; make no request.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the hub, with a model card. Only safetensors, JSON and the card are uploaded.

    The token is that of HF_TOKEN or of `hf auth login`. Afterwards, `--checkpoint USER/NAME` loads the checkpoint on any machine.
    """
    from meteora_core.errors import UsageError
    from meteora_core.fetch.hub_upload import UploadOptions
    from meteora_core.integrations.hub_push import PushOptions, push_checkpoint

    if not message.strip():
        raise UsageError("--message is empty", hint="leave it out, or write something")
    with progress(ctx) as bars:
        options = PushOptions(base, licence, statistics, adapters, dry_run, UploadOptions(public, message, bars))
        done = push_checkpoint(checkpoint, repository, options)
    uploaded = done.uploaded
    if as_json:
        commit = None if uploaded is None else {"revision": uploaded.revision, "private": uploaded.private, "created": uploaded.created, "url": uploaded.url}
        emit_json({"repository": done.repository, "base": done.base, "base_revision": done.revision, "files": done.files, "commit": commit})
        return
    if uploaded is None:
        table = DataTable("file", "MB")
        for name, size in done.files.items():
            table.add_row(name, f"{size / 1e6:.2f}")
        out.print(table)
        for line in done.card.splitlines():
            put(line)
        who = "everyone" if public else "its owners only"
        put(f"dry run: nothing was uploaded. {done.repository} would hold {len(done.files)} files, {_size(sum(done.files.values()))}; if new, for {who}")
        return
    commit_at = f"at {uploaded.revision[:12]}, " if uploaded.revision else ""
    put(f"{uploaded.url}: {len(done.files)} files, {_size(sum(done.files.values()))}, {commit_at}{'private' if uploaded.private else 'public'}")
    put(f"next: meteora chat --checkpoint {done.repository}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
