"""``meteora bench-kernels``: measures the kernels on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora_cli.console import emit_json, progress
from meteora_cli.display import DataTable, out, put, say
from meteora_cli.flags import given_flags, refuse_without_effect

if TYPE_CHECKING:
    import torch

    from meteora_core.bench import EndToEnd, LayerBench
    from meteora_core.bench.contenders import Setting
    from meteora_core.bench.shapes import ModelShape


def bench_kernels(
    ctx: typer.Context,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Token counts, separated by commas; default with --tune: powers of two and four from 1 to 4096.")
    ] = "1,8,64,512,4096",
    shape: Annotated[str, typer.Option("--model-shape", help="Model whose layers are measured: llama3-8b, llama2-13b or smollm2-135m.")] = "",
    adapters: Annotated[int, typer.Option("--adapters", help="Number of adapters.")] = 28,
    rank: Annotated[int, typer.Option("--rank", help="Rank of every adapter.")] = 8,
    top_k: Annotated[int, typer.Option("--top-k", help="Adapters per token and layer.")] = 2,
    dtype: Annotated[str, typer.Option("--dtype", help="Dtype: bfloat16, float16 or float32; default: bfloat16 on a GPU, float32 on a CPU.")] = "",
    backward: Annotated[bool, typer.Option("--backward", help="Measure forward and backward together.")] = False,
    graph: Annotated[bool, typer.Option("--graph/--no-graph", help="Replay CUDA graphs (on a GPU).")] = True,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Also measure a whole model with random weights: decode, prefill and a training step.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also measure decoding with the base and the fused model under torch.compile; takes minutes (on a GPU).")
    ] = False,
    layers: Annotated[int | None, typer.Option("--layers", help="Number of decoder layers of the whole model.", show_default=False)] = None,
    contenders: Annotated[
        str,
        typer.Option("--contenders", help="Implementations to measure, from peft,loop,gather,reference,dense,triton,fused; default: all.", show_default=False),
    ] = "",
    routes: Annotated[
        str, typer.Option("--routes", help="Choice of adapters: uniform (at random) or local (neighbouring tokens share adapters).")
    ] = "uniform,local",
    tune: Annotated[bool, typer.Option("--tune", help="Find the fastest kernel on this GPU for each size, and use it from then on.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG file for a plot of the ratios.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare MeteoRA's kernels with the base model, one plain LoRA and other implementations in one run.

    With --tune, every kernel that can run on this GPU is measured instead, and the kernels that are faster than the default choices are written to the
    user's table: $METEORA_KERNEL_TABLE, or kernels/GPU.toml in the cache folder.
    """
    import torch

    from meteora_core.bench import ModelSizes, Setting, Timing, bench_end_to_end, bench_layers, plot_layers
    from meteora_core.bench.shapes import shape_named
    from meteora_core.bench.tuning import TOKENS
    from meteora_core.errors import UsageError

    gpu = torch.cuda.is_available()
    needs = {"layers": (end_to_end, "--end-to-end"), "compiled": (end_to_end and graph and gpu, "--end-to-end on a CUDA GPU, with CUDA graphs")}
    if tune:
        needs = dict.fromkeys(("backward", "graph", "end_to_end", "compiled", "layers", "contenders", "routes", "plot"), (False, "a run without --tune"))
    refuse_without_effect(ctx, needs)
    chosen = shape_named(shape or ("llama3-8b" if gpu else "smollm2-135m"))
    name = dtype or ("bfloat16" if gpu else "float32")
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in types:
        raise UsageError(f"unknown dtype {name!r}", hint=f"choose from: {', '.join(types)}")
    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens {tokens!r} is not a list of numbers", hint="for example --tokens 1,64,1024") from None
    if tune:
        if not gpu:
            raise UsageError("--tune measures GPU kernels, and there is no CUDA GPU here", hint="leave out --tune to time the CPU backends")
        _tune(ctx, chosen, Setting(adapters, rank, top_k), counts if "tokens" in given_flags(ctx) else TOKENS, types[name], as_json=as_json)
        return
    if not gpu:
        say("there is no CUDA GPU: the CPU backends run instead")
    wanted = [part.strip() for part in contenders.split(",") if part.strip()] or None
    setting, timing = Setting(adapters, rank, top_k), Timing(types[name], graph=graph)
    with progress(ctx) as bars:
        bench = bench_layers(
            chosen,
            counts,
            setting,
            timing,
            backward=backward,
            contenders=wanted,
            routes=[part.strip() for part in routes.split(",") if part.strip()],
            progress=bars,
        )
        whole = None
        if end_to_end:
            sizes = ModelSizes(context=512, prefill=2048, training=4096) if gpu else ModelSizes(context=64, prefill=256, training=256)
            whole = bench_end_to_end(chosen, setting, replace(timing, seconds=4.0), layers=layers, sizes=sizes, compiled=compiled, progress=bars)
    if plot is not None:
        plot_layers(bench, plot)
    if as_json:
        emit_json({"layers": bench.to_json(), "end_to_end": None if whole is None else whole.to_json()})
        return
    _show_layers(bench)
    if whole is not None:
        _show_model(whole)


def _tune(ctx: typer.Context, shape: ModelShape, setting: Setting, counts: Sequence[int], dtype: torch.dtype, *, as_json: bool) -> None:
    import torch

    from meteora_core.bench.tuning import described, tune

    with progress(ctx) as bars:
        result = tune(shape, setting, counts, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()), progress=bars)
    if as_json:
        emit_json(result.to_json())
        return
    table = DataTable(title=f"{shape.name}: fastest kernels; {setting.adapters} adapters of rank {setting.rank}, top-{setting.top_k}; {result.machine}")
    for column in ("what", "hidden", "outputs", "tokens", "taken before", "taken now", "time"):
        table.add_column(column, justify="left" if column in ("what", "taken before", "taken now") else "right")
    for choice in result.choices:
        now = "" if choice.winner is choice.incumbent else described(choice.winner)
        sizes = (str(choice.hidden), "+".join(map(str, choice.widths)), str(choice.tokens))
        table.add_row("fused group" if choice.kind == "group" else "layer", *sizes, described(choice.incumbent), now, f"{choice.ratio:.3f}" if now else "")
    out.print(table)
    put("no other kernel is faster on this GPU, so nothing was written" if result.file is None else f"written to {result.file}")


def _show_layers(bench: LayerBench) -> None:
    what = "forward and backward" if bench.backward else "forward"
    title = (
        f"{bench.shape}: 7 linear layers of a block, {what}; {bench.adapters} adapters of rank {bench.rank}, top-{bench.top_k}, {bench.dtype}; {bench.machine}"
    )
    table = DataTable(title=title)
    for column in ("tokens", "routes", "contender", "ms", "x base", "GB/s", "roofline", "peak MiB", "error", "mode"):
        table.add_column(column, justify="left" if column in ("routes", "contender", "mode") else "right")
    last = None
    for row in bench.rows:
        if last not in (None, (row.tokens, row.routes)):
            table.add_section()
        last = (row.tokens, row.routes)
        table.add_row(
            str(row.tokens),
            row.routes,
            row.name,
            f"{row.milliseconds:.4g}",
            f"{row.ratio:.2f}",
            f"{row.gigabytes_per_second:.0f}",
            f"{row.roofline:.0%}",
            "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            "" if row.error is None else f"{row.error:.1e}",
            row.mode,
        )
    out.print(table)
    put(f"ceilings measured here: {bench.copy_gbps:.0f} GB/s, {bench.gemm_tflops:.3g} TFLOP/s")
    put(f"base: {bench.base}")
    for count, reason in bench.chosen.items():
        put(f"auto at {count} tokens: {reason}")
    for note in bench.skipped:
        put(f"not run: {note}")


def _show_model(whole: EndToEnd) -> None:
    table = DataTable(title=f"{whole.shape}, {whole.layers} layers, random weights; {whole.dtype}; {whole.machine}")
    for column in ("work", "model", "ms", "tokens/s", "x base", "peak MiB", "mode"):
        table.add_column(column, justify="left" if column in ("work", "model", "mode") else "right")
    for row in whole.rows:
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        table.add_row(row.work, row.name, f"{row.milliseconds:.4g}", f"{row.tokens_per_second:.0f}", f"{row.ratio:.2f}", peak, row.mode)
    out.print(table)
    for mode, base in whole.bases.items():
        put(f"base in mode {mode}: {base}")
    for note in whole.skipped:
        put(f"not run: {note}")
