"""A plot of a layer benchmark."""

from __future__ import annotations

from pathlib import Path

from meteora_core.bench.layers import LayerBench
from meteora_core.errors import UsageError


def plot_layers(bench: LayerBench, path: Path) -> None:
    """Plot the time of each contender, relative to the base, over the number of tokens, with logarithmic axes, and save the plot.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib", hint="pip install 'meteora-lora[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, routes in dict.fromkeys((row.name, row.routes) for row in bench.rows):
        rows = sorted((row for row in bench.rows if (row.name, row.routes) == (name, routes)), key=lambda row: row.tokens)
        label, style = (name, "-") if routes == "uniform" else (f"{name}, {routes} routes", "--")
        axes.plot([row.tokens for row in rows], [row.ratio for row in rows], style, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("time, relative to the base linears")
    axes.set_title(f"{bench.shape}, {bench.adapters} adapters of rank {bench.rank}, top-{bench.top_k}, {bench.dtype}, {bench.machine}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
