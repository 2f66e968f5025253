"""``meteora train``: adapters, one per task, or the gates over them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.console import console, emit_json, out, progress, settings_from

if TYPE_CHECKING:
    import torch

    from meteora_core.model.base import BaseReference
    from meteora_core.settings import Settings


class Stage(StrEnum):
    """What to train."""

    adapters = "adapters"
    gates = "gates"


class Trainable(StrEnum):
    """What trains in the gates' stage."""

    gates = "gates"
    both = "gates+adapters"


class Init(StrEnum):
    """How gates start."""

    normal = "normal"
    zeros = "zeros"
    arrow = "arrow"
    ridge = "ridge"


def train(
    ctx: typer.Context,
    stage: Annotated[Stage, typer.Option(help="adapters: one LoRA per task; gates: the gates over all adapters.")] = Stage.gates,
    task: Annotated[str | None, typer.Option(help="Task names, separated by commas; gates: default is every adapter folder.", show_default=False)] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="gates: the checkpoint's folder (default: runs/meteora); adapters: their parent.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Datasets.", show_default=False)] = None,
    adapters: Annotated[Path | None, typer.Option(help="Adapter folders.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a catalog name, a folder or a hub id.", show_default=False)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward pass.", show_default=False)] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes in one step.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row, in tokens.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.", show_default=False)] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time.", show_default=False)
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first so many train rows of a task.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(help="adapters: LoRA rank.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="adapters: LoRA alpha.", show_default=False)] = None,
    beta: Annotated[float | None, typer.Option(help="gates: weight of the gate loss.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="gates: adapters per token.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option("--T", help="gates: routing temperature.", show_default=False)] = None,
    trainable: Annotated[Trainable | None, typer.Option(help="gates: what trains.", show_default=False)] = None,
    init: Annotated[Init | None, typer.Option(help="gates: how they start.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …", show_default=False)] = None,
    backend: Annotated[str | None, typer.Option(help="gates: mixture kernels.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state of the same run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if the same result is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train one LoRA per task (--stage adapters), or the gates over all adapters (the default).

    Adapters and datasets are matched by name: adapters/gsm8k learns from, and its gate is labelled by, datasets/gsm8k.
    """
    section = "train_adapters" if stage is Stage.adapters else "train_gates"
    shared = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "learning_rate": lr,
        "max_length": max_length,
        "seed": seed,
        "gradient_checkpointing": gradient_checkpointing,
    }
    own: dict[str, Any] = {"rank": rank, "alpha": alpha}
    if stage is Stage.gates:
        own = {"beta": beta, "trainable": trainable and trainable.value, "init": init and init.value}
    settings = settings_from(
        ctx,
        paths__data=data,
        paths__adapters=adapters,
        model__base=base,
        model__dtype=dtype,
        model__device=device,
        model__backend=backend,
        routing__top_k=top_k,
        routing__temperature=temperature,
        **{f"{section}__{name}": value for name, value in {**shared, **own}.items()},
    )
    from meteora_core.model.base import BaseReference, pick_device, pick_dtype

    reference = BaseReference(settings.model.base, settings.model.revision, settings.model.trust_remote_code)
    place = pick_device(settings.model.device)
    kind = pick_dtype(settings.model.dtype, place)
    console.print(f"{settings.model.base} in {str(kind).removeprefix('torch.')} on {place}", markup=False)
    work = _adapters if stage is Stage.adapters else _gates
    report = work(ctx, settings, reference, place, kind, task, out_dir, max_rows, resume, force)
    if as_json:
        emit_json(report)


def _names(task: str | None) -> list[str]:
    return [name.strip() for name in (task or "").split(",") if name.strip()]


def _adapters(
    ctx: typer.Context,
    settings: Settings,
    base: BaseReference,
    device: torch.device,
    dtype: torch.dtype,
    task: str | None,
    out_dir: Path | None,
    max_rows: int | None,
    resume: bool,
    force: bool,
) -> list[dict[str, Any]]:
    from meteora_core.data.rows import available_tasks, read_rows
    from meteora_core.errors import UsageError
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.adapters import train_adapter

    names = _names(task)
    if names == ["all"]:
        names = [name for name in available_tasks(settings.paths.data) if not name.startswith("composite_")]
    if not names:
        raise UsageError("no task given", hint="meteora train --stage adapters --task NAME[,NAME] | all; `meteora data list` shows them")
    for name in names:
        read_rows(settings.paths.data, name, "train", 1)
    target = out_dir or settings.paths.adapters
    report = []
    with progress(ctx) as bars:
        model = load_base(base, dtype=dtype, device=device, progress=bars)
        tokenizer = load_tokenizer(base, progress=bars)
        for name in names:
            done = train_adapter(
                model,
                tokenizer,
                name,
                base=base,
                data_dir=settings.paths.data,
                out_dir=target,
                settings=settings.train_adapters,
                max_rows=max_rows,
                resume=resume,
                force=force,
                progress=bars,
            )
            report.append({**done.__dict__, "folder": str(done.folder)})
    for entry in report:
        state = "was there already" if entry["skipped"] else f"{entry['steps']} steps, {entry['seconds']:.0f} s"
        note = f", {entry['cut']} rows cut to {settings.train_adapters.max_length} tokens" if entry["cut"] else ""
        console.print(f"{entry['folder']}: loss {entry['loss']:.3f} ({state}{note})", markup=False)
    return report


def _gates(
    ctx: typer.Context,
    settings: Settings,
    base: BaseReference,
    device: torch.device,
    dtype: torch.dtype,
    task: str | None,
    out_dir: Path | None,
    max_rows: int | None,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.data.rows import available_tasks
    from meteora_core.model.base import load_base, load_tokenizer
    from meteora_core.training.common import adapter_folders
    from meteora_core.training.gates import check_pairs, train_gates

    folders = adapter_folders(settings.paths.adapters, _names(task))
    check_pairs(tuple(folders), available_tasks(settings.paths.data))
    target = out_dir or settings.paths.runs / "meteora"
    with progress(ctx) as bars:
        bank = AdapterBank.from_peft(folders, progress=bars)
        model = load_base(base, dtype=dtype, device=device, progress=bars)
        done = train_gates(
            model,
            load_tokenizer(base, progress=bars),
            bank,
            base=base,
            data_dir=settings.paths.data,
            folder=target,
            settings=settings.train_gates,
            top_k=min(settings.routing.top_k, len(bank)) if "top_k" not in settings.routing.model_fields_set else settings.routing.top_k,
            temperature=settings.routing.temperature or 1.0,
            backend=settings.model.backend,
            max_rows=max_rows,
            resume=resume,
            force=force,
            progress=bars,
        )
    state = "was there already" if done.skipped else f"{done.steps} steps, {done.seconds:.0f} s"
    console.print(f"{done.folder}: loss {done.loss:.3f} ({state})", markup=False)
    if done.held_out:
        from rich.table import Table

        table = Table("held-out train rows", "value")
        for name, value in done.held_out.items():
            table.add_row(name, f"{value:.1%}" if "accuracy" in name else f"{value:.3f}")
        (console if ctx.obj is None else out).print(table)
    return {**done.__dict__, "folder": str(done.folder)}
