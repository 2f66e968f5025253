"""``meteora ckpt export``: writes a checkpoint, or one of its adapters, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora_cli.commands.shared_options import AdaptersDir, AsJson, Force
from meteora_cli.console import emit_json, progress
from meteora_cli.display import put
from meteora_cli.flags import refuse_without_effect

if TYPE_CHECKING:
    from meteora_core.exports.common import Exported, ExportOptions

FORMATS = ("peft", "merged", "gguf", "vllm")
"""The values of ``--format``."""


def export(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A native checkpoint, or its id on the hub.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    adapter: Annotated[str | None, typer.Option("--adapter", help="Adapter to write as a PEFT folder, or as GGUF with --gguf.", show_default=False)] = None,
    merge: Annotated[str | None, typer.Option("--merge", help="Adapter to merge into the base model, for transformers.", show_default=False)] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write the adapter as adapter.gguf, which llama.cpp loads.")] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="Format: peft, merged or gguf, which --adapter, --merge or --gguf implies; or vllm, for the whole model.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of a merged model or a GGUF file: float32, float16 or, for a merged model, bfloat16.")
    ] = "float32",
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that the checkpoint names.", show_default=False)] = None,
    adapters: AdaptersDir = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a PEFT folder or for llama.cpp, merge an adapter into the base model, or write the whole model for vLLM."""
    from meteora_core.exports.common import ExportOptions

    chosen = _format(form, adapter, merge, gguf=gguf)
    refuse_without_effect(ctx, {"dtype": (chosen in ("merged", "gguf"), "--merge or --gguf")})
    with progress(ctx) as bars:
        done = _write(chosen, checkpoint, folder, adapter or merge or "", ExportOptions(base, adapters, force, bars), dtype)
    if as_json:
        emit_json({"path": str(done.folder), "format": done.kind, "adapter": done.adapter, "files": list(done.files), "bytes": done.size})
        return
    what = {"peft": "a PEFT adapter", "merged": "a model for transformers", "gguf": "an adapter for llama.cpp", "vllm": "a model for vLLM"}[done.kind]
    put(f"{done.folder}: {done.adapter} as {what}, {done.size / 1e6:.1f} MB")
    if done.kind == "vllm":
        put(f"next: vllm serve {done.folder}   (with pip install 'meteora-lora[vllm]')")


def _format(form: str | None, adapter: str | None, merge: str | None, *, gguf: bool) -> str:
    """Return the format that the flags ask for. Raises UsageError if they contradict each other."""
    from meteora_core.errors import UsageError

    if adapter is not None and merge is not None:
        raise UsageError("--adapter and --merge exclude each other", hint="run the command once for each")
    if gguf and (merge is not None or form not in (None, "gguf")):
        raise UsageError("--gguf writes one adapter", hint="pass --adapter NAME --gguf")
    if form is not None and form not in FORMATS:
        raise UsageError(f"unknown format {form!r}", hint=f"choose from: {', '.join(FORMATS)}")
    if form == "vllm":
        if adapter is not None or merge is not None:
            raise UsageError("--format vllm writes all adapters", hint="leave out --adapter and --merge; `meteora ckpt pack` chooses adapters")
        return form
    chosen = form or ("gguf" if gguf else "merged" if merge is not None else "peft")
    if chosen == "merged" and merge is None:
        raise UsageError("--format merged needs the name of an adapter", hint="pass --merge NAME")
    if chosen != "merged" and adapter is None:
        raise UsageError(
            "nothing says what to export",
            hint="pass --adapter NAME for a PEFT folder, with --gguf for llama.cpp, --merge NAME for a merged model, or --format vllm",
        )
    return chosen


def _write(form: str, checkpoint: Path, folder: Path, name: str, options: ExportOptions, dtype: str) -> Exported:
    if form == "merged":
        from meteora_core.exports.merged import export_merged

        return export_merged(checkpoint, folder, name, options, dtype)
    if form == "gguf":
        from meteora_core.exports.gguf_adapter import export_gguf

        return export_gguf(checkpoint, folder, name, options, dtype)
    if form == "vllm":
        from meteora_core.exports.vllm_model import export_vllm

        return export_vllm(checkpoint, folder, options)
    from meteora_core.exports.peft_adapter import export_adapter

    return export_adapter(checkpoint, folder, name, options)
