"""``meteora adapters``: adds adapters to a checkpoint, and drops, updates and lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora_cli.commands.shared_options import AdaptersDir, AsJson, LoadedBase
from meteora_cli.console import emit_json, progress, settings_from
from meteora_cli.display import DataTable, out, put
from meteora_cli.typer_app import App
from meteora_core.choices import Dtype, SecondMoments
from meteora_core.errors import UsageError

if TYPE_CHECKING:
    from meteora_core.living.checkpoints import ChangeOptions
    from meteora_core.living.live_bank import Change
    from meteora_core.progress import Progress

app = App(help="Add, drop, update and list the adapters of a checkpoint. After a change, the gates are solved again in closed form.", no_args_is_help=True)

Checkpoint = Annotated[Path, typer.Argument(help="A native checkpoint, such as one from `meteora route`.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's PEFT folder, or its id on the hub.", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", help="The adapter's name; default: the folder's name.", show_default=False)]
Rows = Annotated[
    Path | None, typer.Option("--rows", help="A file or folder of the adapter's rows; default: the one with the adapter's name.", show_default=False)
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of datasets and of files of rows, named after the adapters.")]


@dataclass(frozen=True)
class ClosedForm:
    """Options of the forward passes that collect statistics for the closed form."""

    tokens: Annotated[int | None, typer.Option("--tokens", help="Number of tokens of an adapter's rows to use.")] = None
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest row in tokens; longer ones lose the start of their prompt.")] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Number of rows in one forward pass.")] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the choice of rows.")] = None


@dataclass(frozen=True)
class StatisticsForm:
    """How much answer tokens count in new statistics, and how the statistics are stored."""

    answer_share: Annotated[float | None, typer.Option("--answer-share", help="Share of the answer tokens in the weight of an adapter.")] = None
    statistics: Annotated[SecondMoments | None, typer.Option("--statistics", help="Form of stored second moments.")] = None


@dataclass(frozen=True)
class Hardware:
    """Where the base model runs, in which dtype, and with which implementation of the adapters."""

    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Dtype of the base model.")] = None
    device: Annotated[str | None, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:1 or mps.")] = None
    backend: Annotated[str | None, typer.Option("--backend", help="Implementation of the sum over adapters: auto, reference, dense or triton.")] = None


@app.command("list")
def list_(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """List the adapters of a checkpoint, with the statistics from which their gates are solved."""
    from meteora_core.living.checkpoints import list_adapters

    entries = list_adapters(checkpoint)
    if as_json:
        emit_json([asdict(each) for each in entries])
        return
    table = DataTable("adapter", "rank", "statistics", "rows", "tokens", "frame")
    for each in entries:
        size = "none" if each.statistics is None else f"{each.statistics / 1e6:.1f} MB, {each.form}"
        seen = ("", "", "") if each.statistics is None else (f"{each.rows:,}", f"{each.tokens:,}", repr(each.frame))
        table.add_row(each.name, str(each.rank), size, *seen)
    out.print(table)


def add_or_update(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    folder: Folder,
    *,
    name: Name = None,
    rows: Rows = None,
    data: Data = None,
    self_written: Annotated[
        bool,
        typer.Option("--self-written", help="Let an adapter without statistics and rows write rows itself, with example prompts if there are any."),
    ] = False,
    closed_form: ClosedForm,
    adapters_dir: AdaptersDir = None,
    base: LoadedBase = None,
    hardware: Hardware,
    as_json: AsJson = False,
) -> None:
    """Do what the command's name says: ``add`` or ``update``, which have the same options."""
    from meteora_core.adapters.base_route import NO_ADAPTER
    from meteora_core.living.checkpoints import add_adapter, add_base_route, update_adapter

    change = {"add": add_adapter, "update": update_adapter}[ctx.info_name or ""]
    with progress(ctx) as bars:
        options = replace(_options(ctx, bars, base, adapters_dir, rows), self_written=self_written)
        if ctx.info_name == "add" and str(folder) == NO_ADAPTER and name is None and not folder.exists():
            done = add_base_route(checkpoint, options)
        else:
            done = change(checkpoint, folder, name, options)
    _report(checkpoint, done, as_json=as_json)


ADD = """Add an adapter to a checkpoint. All gates are solved again in closed form.

The adapter needs statistics (`gate_stats.safetensors` in its folder) or rows. The other adapters need neither rows nor a forward pass if the
checkpoint contains their statistics. Pass `no_adapter` instead of a folder to add the base route, for tokens that need no adapter.
"""
app.command("add", help=ADD)(add_or_update)
app.command("update", help="Replace an adapter of a checkpoint with a new version. Its index stays the same.")(add_or_update)


@app.command("drop")
def drop(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    name: Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)],
    adapters_dir: AdaptersDir = None,
    base: LoadedBase = None,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter from a checkpoint.

    Closed-form gates are solved again from the statistics of the other adapters, as if the adapter had never been added. If the gates were trained, the
    rows of the adapter are deleted from them, and the other rows stay unchanged.
    """
    from meteora_core.living.checkpoints import drop_adapter

    with progress(ctx) as bars:
        done = drop_adapter(checkpoint, name, _options(ctx, bars, base, adapters_dir))
    _report(checkpoint, done, as_json=as_json)


@app.command("collect")
def collect(
    ctx: typer.Context,
    folder: Folder,
    *,
    name: Name = None,
    rows: Rows = None,
    data: Data = None,
    closed_form: ClosedForm,
    statistics_form: StatisticsForm,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that the adapter names.", show_default=False)] = None,
    hardware: Hardware,
    as_json: AsJson = False,
) -> None:
    """Write an adapter's statistics into its folder, so that others can route to it without its rows.

    `meteora route` and `meteora adapters add` use them if they were collected with the same answer share and prompt frame.
    """
    from meteora_core.living.shipping import ship_statistics

    with progress(ctx) as bars:
        shipped = ship_statistics(folder, name, _options(ctx, bars, base, None, rows))
    report = shipped.header.model_dump(include={"adapter", "rows", "tokens", "recipe"}) | {"path": str(shipped.file), "bytes": shipped.size}
    if as_json:
        emit_json(report)
        return
    header = shipped.header
    put(f"{shipped.file}: statistics of {shipped.name} over {header.rows:,} rows, {header.tokens:,} tokens, {shipped.size / 1e6:.1f} MB")


def check_data(ctx: typer.Context) -> None:
    """Raise UsageError if ``--data`` does not name a folder; no adapter would find its rows there."""
    data = ctx.params.get("data")
    if data is not None and not data.is_dir():
        what = f"{data} is a file; --data takes a folder" if data.exists() else f"no such folder: {data}"
        raise UsageError(what, hint="the folder holds a dataset NAME/ or a file NAME.jsonl for each adapter")


def _options(ctx: typer.Context, bars: Progress, base: str | None, adapters_dir: Path | None, rows: Path | None = None) -> ChangeOptions:
    from meteora_core.living.checkpoints import ChangeOptions
    from meteora_core.model.base import BaseReference

    check_data(ctx)
    settings = settings_from(ctx)
    named = None if base is None else BaseReference(base, settings.model.revision, settings.model.trust_remote_code)
    return replace(ChangeOptions.from_settings(settings, bars), base=named, adapters_dir=adapters_dir, rows=rows)


def _report(checkpoint: Path, done: Change, *, as_json: bool) -> None:
    from meteora_core.adapters.base_route import NO_ADAPTER

    if as_json:
        emit_json({"path": str(checkpoint), **asdict(done)})
        return
    verb = {"add": "added", "drop": "dropped", "update": "updated"}[done.action]
    count, with_base = sum(name != NO_ADAPTER for name in done.adapters), " and the base route" if NO_ADAPTER in done.adapters else ""
    put(f"{checkpoint}: {verb} {done.adapter}, {count} adapter{'s' * (count != 1)}{with_base} ({done.seconds:.0f} s)")
    if done.gates == "deleted":
        put("the rows of the adapter were deleted from all gates; the other rows are unchanged")
    elif done.correction is None:
        put("all gates were solved again from the statistics of all adapters")
    else:
        kept = (
            f"{done.correction:.0%} of what training or routed rows had added was kept"
            if done.correction
            else "what training or routed rows had added was left out"
        )
        put(f"all gates were solved again; {kept}, which routes held-out rows best")
    if accuracy := done.held_out.get("gate_accuracy"):
        put(f"{accuracy:.1%} of held-out answer tokens are routed to their own adapter")
