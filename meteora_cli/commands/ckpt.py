"""``meteora ckpt``: download models, look into checkpoints, convert the authors' layout."""

from __future__ import annotations

from typing import Annotated

import typer

from meteora_cli.console import emit_json, out, progress

app = typer.Typer(help="Download models, look into checkpoints, convert the authors' layout.", no_args_is_help=True)


@app.command("download")
def download(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What to fetch: smollm2-135m.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Fetch and convert again even if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Fetch a model into the cache; what is there already is not fetched again."""
    from meteora_core.checkpoints.catalog import catalog_entry, download_base
    from meteora_core.files import sha256

    entry = catalog_entry(name)
    with progress(ctx) as bars:
        path = download_base(name, progress=bars, force=force)
    if as_json:
        emit_json({"name": name, "kind": "base", "path": str(path), "sha256": sha256(path / "model.safetensors"), "description": entry.description})
    else:
        out.print(f"{name}: {path}", markup=False, soft_wrap=True)
