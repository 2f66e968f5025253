"""``meteora route``: makes a routed model of a folder of adapters."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from meteora_cli.commands.adapters import ClosedForm, Data, Hardware, StatisticsForm, check_data
from meteora_cli.commands.shared_options import AsJson
from meteora_cli.console import emit_json, progress, settings_from
from meteora_cli.display import DataTable, out, put
from meteora_cli.flags import comma_separated


def route(
    ctx: typer.Context,
    *,
    adapters: Annotated[Path | None, typer.Argument(help="Folder that contains one PEFT folder per adapter, or ids on the hub, separated by commas.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the checkpoint to write; default: runs/routed.", show_default=False)] = None,
    data: Data = None,
    only: Annotated[str | None, typer.Option("--only", help="Adapters to use, separated by commas; default: all.", show_default=False)] = None,
    exclude: Annotated[str | None, typer.Option("--exclude", help="Adapters to leave out, separated by commas.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that most adapters name.", show_default=False)] = None,
    closed_form: ClosedForm,
    statistics_form: StatisticsForm,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Adapters per token and layer; default: 2.", show_default=False)] = None,
    routing_temperature: Annotated[float | None, typer.Option("--T", help="Routing temperature T; default: 1.", show_default=False)] = None,
    base_route: Annotated[
        bool, typer.Option("--base-route/--no-base-route", help="Add a base route: tokens that need no adapter get the base model alone.")
    ] = True,
    self_written: Annotated[
        bool,
        typer.Option(
            "--self-written", help="Let adapters without rows write rows themselves, with example prompts if there are any. Without it, they are left out."
        ),
    ] = False,
    routed_rows: Annotated[
        bool,
        typer.Option("--routed-rows", help="Run half of the rows once more, as the gates route them, and solve the gates again."),
    ] = False,
    steps: Annotated[int, typer.Option("--steps", min=0, max=10_000_000, help="Gradient steps on the gates after the closed form.")] = 0,
    embed: Annotated[
        bool | None, typer.Option("--embed/--no-embed", help="Store the adapters in the checkpoint; default: if they have at most 2 GiB.", show_default=False)
    ] = None,
    hardware: Hardware,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a folder of LoRA adapters into a routed model without training. The gates are solved in closed form.

    The rows of an adapter are its built dataset or a file NAME.jsonl (.csv, .parquet, …) in the folder of datasets, a file NAME.jsonl next to the
    adapter, or train.jsonl in its folder. Adapters that cannot be used are left out, and the reason is printed.
    """
    from meteora_core.adapters.base_route import NO_ADAPTER
    from meteora_core.living.route import LOW, RouteOptions, route_adapters
    from meteora_core.model.base import BaseReference

    check_data(ctx)
    settings = settings_from(ctx, model__base=base)
    model, routing = settings.model, settings.routing
    with progress(ctx) as bars:
        options = replace(
            RouteOptions.from_settings(settings, bars),
            only=tuple(comma_separated(only)),
            exclude=tuple(comma_separated(exclude)),
            base=BaseReference(model.base, model.revision, model.trust_remote_code) if "base" in model.model_fields_set else None,
            top_k=routing.top_k,
            temperature=routing.temperature or 1.0,
            base_route=base_route,
            self_written=self_written,
            routed_rows=routed_rows,
            steps=steps,
            embed=embed,
            overwrite=force,
        )
        done = route_adapters(settings.paths.adapters, out_dir or settings.paths.runs / "routed", options)
    if as_json:
        emit_json(asdict(done))
        return
    table = DataTable("adapter", "rows from", "held-out answer tokens routed correctly")
    for name in done.adapters:
        accuracy = done.held_out.get(f"gate_accuracy/{name}")
        table.add_row(name, done.rows[name] or "its own statistics", "–" if accuracy is None else f"{accuracy:.1%}")
    for name, why in done.set_aside.items():
        table.add_row(name, f"left out: {why}", "")
    out.print(table)
    count, also = len(done.adapters) - base_route, "and the base route " if base_route else ""
    put(f"{done.folder}: {count} adapter{'s' * (count != 1)} {also}of {done.base} ({done.seconds:.0f} s)")
    approximate = ", with second moments of low rank" if "low-rank" in done.forms else ""
    put(f"statistics of {done.tokens:,} tokens: {done.bytes / 1e6:.{0 if done.bytes >= 1e7 else 1}f} MB{approximate}")
    measured = any(f"gate_accuracy/{name}" in done.held_out for name in done.adapters if name != NO_ADAPTER)  # general text alone says nothing
    if measured and (accuracy := done.held_out.get("gate_accuracy")):
        after = f"after {steps} gradient steps" if steps else "without a training step"
        put(f"{accuracy:.1%} of held-out answer tokens are routed to their own adapter, {after}")
        if accuracy < LOW:
            more = "--tokens" if routed_rows else "--tokens or --routed-rows"
            put(f"this is below {LOW:.0%}: use more rows with {more}, or train the gates with --steps 100")
    put(f"next: meteora chat --checkpoint {shlex.quote(str(done.folder))}")
