"""``meteora ckpt``: downloads models, and inspects, converts, packs, exports and uploads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands.ckpt_export import export
from meteora_cli.commands.ckpt_push import push
from meteora_cli.commands.shared_options import AdaptersDir, AsJson, Force
from meteora_cli.console import emit_json, progress
from meteora_cli.display import DataTable, out, put
from meteora_cli.typer_app import App

if TYPE_CHECKING:
    from meteora_core.checkpoints.convert import BaseTensors

app = App(help="Download models, and inspect, convert, pack, export and upload checkpoints.", no_args_is_help=True)


@app.command("download")
def download(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, meteora-llama3-8b, meteora-llama2-13b,"
            " or a hub repository ORGANISATION/NAME or ORGANISATION/NAME@REVISION.",
            show_default=False,
        ),
    ],
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Pattern of the files to fetch from a hub repository, such as '*/top_1/*'; can be repeated.", show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for a hub repository; default: the hub's cache.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch existing files again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model or a checkpoint. Existing files are not fetched again, and interrupted downloads resume."""
    from meteora_core.errors import UsageError, did_you_mean
    from meteora_core.fetch.catalog import CATALOG
    from meteora_core.fetch.hub import KNOWN, HubOptions, download_known, download_repo, split_revision

    short, _, revision = name.partition("@")
    if short in CATALOG:
        _download_base(ctx, name, include=include, to=to, force=force, as_json=as_json)
        return
    if "/" not in name and short not in KNOWN:
        names = [*CATALOG, *KNOWN]
        hint = did_you_mean(name, names) or f"known: {', '.join(names)}; or a hub repository such as ORGANISATION/NAME"
        raise UsageError(f"nothing to download is named {name!r}", hint=hint)
    wanted = tuple(include) if include else None
    with progress(ctx) as bars:
        if short in KNOWN:
            fetched = download_known(short, HubOptions(revision or None, wanted, to), force=force, progress=bars)
        else:
            repository, revision_ = split_revision(name)
            fetched = download_repo(repository, HubOptions(revision_, wanted, to), force=force, progress=bars)
    if as_json:
        emit_json(
            {
                "name": name,
                "kind": "hub",
                "path": str(fetched.path),
                "repository": fetched.repository,
                "revision": fetched.revision,
                "files": list(fetched.files),
                "bytes": fetched.size,
                "fetched": fetched.fetched,
            }
        )
        return
    put(f"{name}: {fetched.path}")
    commit = f" at {fetched.revision[:12]}" if fetched.revision else ""
    put(f"{len(fetched.files)} files, {_size(fetched.size)} ({_size(fetched.fetched)} fetched now), {fetched.repository}{commit}")
    if short in KNOWN:
        checkpoint = fetched.path / KNOWN[short].include[0].removesuffix("/*")
        adapters = fetched.path / KNOWN[short].include[1].removesuffix("/*")
        example = f"meteora ckpt convert {checkpoint} runs/{short} --base {KNOWN[short].base} --adapters {adapters}"
        put(f"next: {example}")


def _download_base(ctx: typer.Context, name: str, *, include: list[str] | None, to: Path | None, force: bool, as_json: bool) -> None:
    from meteora_core.errors import UsageError
    from meteora_core.fetch.base_models import download_base
    from meteora_core.fetch.catalog import catalog_entry
    from meteora_core.files import sha256

    entry = catalog_entry(name)
    if include or to is not None:
        raise UsageError(f"{name} is always fetched completely into the cache", hint="leave out --include and --to; METEORA_CACHE sets the folder of the cache")
    with progress(ctx) as bars:
        path = download_base(name, progress=bars, force=force)
    if as_json:
        emit_json({"name": name, "kind": "base", "path": str(path), "sha256": sha256(path / "model.safetensors"), "description": entry.description})
    else:
        put(f"{name}: {path}")


@app.command("inspect")
def inspect(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="A folder, a safetensors file, or the id of a checkpoint on the hub.", show_default=False)],
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Compute the SHA-256 of the weight files, which reads them completely.")] = True,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint, adapter or model without loading its weights."""
    from meteora_core.checkpoints.inspect import inspect_checkpoint

    with progress(ctx) as bars:
        facts = inspect_checkpoint(path, hashes=hashes, progress=bars)
    if as_json:
        emit_json(facts)
    else:
        _show(facts)


@app.command("convert")
def convert(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="The authors' model.safetensors, or the folder that contains it or its shards.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder of the native checkpoint to write.", show_default=False)],
    base: Annotated[
        str, typer.Option("--base", "--model", help="Base model that the checkpoint was trained on: a folder, a known name, or a hub id.", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub base model.", show_default=False)] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="Folder with one PEFT folder per adapter, from which names and alphas are read.", show_default=False)
    ] = None,
    names: Annotated[
        str | None, typer.Option("--names", help="Names of the adapters in the order of the checkpoint, separated by commas.", show_default=False)
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha of all adapters, without --adapters; default: 16.", show_default=False)] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Adapters per token and layer, stored as the default.")] = 2,
    routing_temperature: Annotated[float, typer.Option("--T", help="Routing temperature T, stored as the default.")] = 1.0,
    base_tensors: Annotated[
        str, typer.Option("--base-tensors", help="Base tensors to store: changed (those that differ from the base model) or all.")
    ] = "changed",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint in the authors' layout to a native checkpoint, tensor by tensor."""
    from typing import cast

    from meteora_core.checkpoints.authors_layout import AuthorsAdapters
    from meteora_core.checkpoints.convert import ConvertOptions, convert_authors
    from meteora_core.model.base import BaseReference
    from meteora_core.ranges import check_range

    if alpha is not None:
        check_range("--alpha", alpha, 0, 10**9, above=True)
    with progress(ctx) as bars:
        done = convert_authors(
            checkpoint,
            folder,
            BaseReference(base, revision),
            adapter_dir=AuthorsAdapters(adapters, None if names is None else [name.strip() for name in names.split(",") if name.strip()], alpha),
            options=ConvertOptions(top_k, routing_temperature, cast("BaseTensors", base_tensors)),
            overwrite=force,
            progress=bars,
        )
    if as_json:
        emit_json(
            {
                "path": str(done.folder),
                "adapters": list(done.adapters),
                "rank": done.rank,
                "layers": done.layers,
                "base": base,
                "base_tensors": list(done.base_tensors),
                "bytes": done.size,
                "sha256": done.sha256,
            }
        )
        return
    put(f"{done.folder}: {len(done.adapters)} adapters of rank {done.rank} on {done.layers} linear layers, {_size(done.size)}")
    if done.base_tensors:
        put(f"{len(done.base_tensors)} base tensors are stored too, because they differ from those of {base}")


@app.command("pack")
def pack(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A native checkpoint, or its id on the hub.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint to write.", show_default=False)],
    adapters: AdaptersDir = None,
    task: Annotated[str | None, typer.Option("--task", help="Adapters to keep, in this order, separated by commas; default: all.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of an adapter in a layer.", show_default=False)] = None,
    max_mb: Annotated[float | None, typer.Option("--max-mb", help="Largest size of the folder in MB (millions of bytes).", show_default=False)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Dtype of the stored tensors: bfloat16, float16 or float32.")] = "bfloat16",
    statistics: Annotated[bool, typer.Option("--statistics", help="Keep the gate statistics, so that adapters can join the new checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a small checkpoint that contains its adapters, so that it needs no adapter folders.

    To meet a limit, adapters are cut by singular values, in those layers where the loss is smallest.
    """
    import torch

    from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
    from meteora_core.errors import UsageError
    from meteora_core.ranges import check_range

    if rank is not None:
        check_range("--rank", rank, 1, 65536)
    if max_mb is not None:
        check_range("--max-mb", max_mb, 0, 10**9, above=True)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"unknown dtype {dtype!r}", hint="choose from: bfloat16, float16, float32")
    with progress(ctx) as bars:
        done = pack_checkpoint(
            checkpoint,
            folder,
            PackOptions(
                tasks=None if task is None else [name.strip() for name in task.split(",") if name.strip()],
                rank=rank,
                max_bytes=None if max_mb is None else int(max_mb * 1e6),
                dtype=getattr(torch, dtype),
                statistics=statistics,
            ),
            adapters_dir=adapters,
            overwrite=force,
            progress=bars,
        )
    if as_json:
        emit_json(
            {"path": str(done.folder), "adapters": list(done.adapters), "ranks": done.ranks, "kept": done.kept, "bytes": done.size, "sha256": done.sha256}
        )
        return
    table = DataTable("adapter", "mean rank", "squared norm kept")
    for name in done.adapters:
        table.add_row(name, f"{done.ranks[name]:.2f}", f"{done.kept[name]:.1%}")
    out.print(table)
    put(f"{done.folder}: {len(done.adapters)} adapters and their gates, {_size(done.size)}")


@app.command("card")
def card(
    folder: Annotated[Path, typer.Argument(help="A native checkpoint.", show_default=False)],
    title: Annotated[str | None, typer.Option("--title", help="Title; default: the folder's name.", show_default=False)] = None,
    results: Annotated[Path | None, typer.Option("--results", help="Folder of the results of `meteora eval` on this checkpoint.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the datasets that it was trained on.", show_default=False)] = None,
    licence: Annotated[
        list[str] | None, typer.Option("--licence", help="Source and licence of a task's rows, as TASK=TEXT; can be repeated.", show_default=False)
    ] = None,
) -> None:
    """Write README.md into the folder of a checkpoint: data, licences, training, scores and hashes."""
    from meteora_core.errors import UsageError
    from meteora_core.evaluation.card import write_card

    stated = {}
    for entry in licence or []:
        name, equals, text = entry.partition("=")
        if not (name.strip() and equals and text.strip()):
            raise UsageError(f"--licence {entry!r} is not TASK=TEXT", hint="--licence 'gsm8k=MIT'")
        stated[name.strip()] = text.strip()
    put(str(write_card(folder, title=title, results=results, data_dir=data, licences=stated)))


app.command("export")(export)
app.command("push")(push)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _frame_text(frame: dict[str, Any] | None) -> str:
    """Return the text around a message in prompts, in one line."""
    from meteora_core.data.frames import read_frame
    from meteora_core.text import shown

    known = read_frame(frame)
    if known is None:
        return "-"
    name = {"raw": "as they are", "chat": "chat template"}.get(known.name, shown(known.text, limit=80))
    return name + (f", end {known.end}" if known.end else "")


_KINDS = {
    "native": "a native meteora checkpoint",
    "authors": "a checkpoint in the authors' layout (`meteora ckpt convert` converts it to a native one)",
    "adapter": "a PEFT LoRA adapter",
    "adapters": "a folder of PEFT LoRA adapters",
    "base": "a base model",
    "unknown": "an unknown kind of file",
}


def _show(facts: dict[str, Any]) -> None:
    put(f"{facts['path']}: {_KINDS[facts['kind']]}")
    table = DataTable.grid(padding=(0, 2))
    base = facts.get("base")
    if base:
        table.add_row("base", ", ".join(f"{key} {value}" for key, value in base.items() if value is not None and not isinstance(value, dict)))
    if "adapter_count" in facts:
        table.add_row("adapters", f"{facts['adapter_count']} of rank {', '.join(map(str, facts['ranks']))}")
    if "layers" in facts:
        table.add_row("on", f"{facts['layers']} linear layers: {', '.join(facts['targets'])}")
    if "top_k" in facts:
        table.add_row("routing", f"top-{facts['top_k']}, T = {facts['temperature']}")
    if facts.get("frame"):
        table.add_row("prompts", _frame_text(facts["frame"]))
    if "contains" in facts:
        table.add_row("holds", ", ".join(facts["contains"]))
    if facts.get("features"):
        said = {"scale": "DoRA", "shift": "biases", "experts": "experts of mixtures"}
        table.add_row("adapters with", ", ".join(said[name] for name in facts["features"]))
    if facts.get("gates"):
        table.add_row("gates", facts["gates"])
    if "parameters" in facts:
        table.add_row("parameters", ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items()))
        table.add_row("dtypes", ", ".join(facts["dtypes"]))
    if facts.get("intact") is not None:
        table.add_row("intact", "yes" if facts["intact"] else "NO: the weight file is not the one that was saved")
    if facts.get("refused"):
        table.add_row("refused", f"{', '.join(facts['refused'])} (pickle, never read)")
    out.print(table)
    if "adapters" in facts:
        framed = ["prompts"] if any(adapter.get("frame") for adapter in facts["adapters"]) else []
        listed = DataTable("adapter", "rank", "alpha", "sha256", "source", *framed)
        for adapter in facts["adapters"]:
            alpha = f"{adapter['alpha']}{' (rsLoRA)' if adapter['rslora'] else ''}"
            frame = [_frame_text(adapter.get("frame"))] if framed else []
            listed.add_row(adapter["name"], str(adapter["rank"]), alpha, (adapter["sha256"] or "-")[:12], str(adapter["source"]), *frame)
        out.print(listed)
    for file in facts["files"][:20]:
        put(f"{file['name']}  {_size(file['bytes'])}  {file['sha256'] or ''}")
