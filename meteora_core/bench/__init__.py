"""Benchmarks of the mixture kernels on the user's machine."""

from meteora_core.bench.contenders import Setting
from meteora_core.bench.end_to_end import EndToEnd, ModelSizes, bench_end_to_end
from meteora_core.bench.layers import LayerBench, LayerRow, bench_layers
from meteora_core.bench.plot import plot_layers
from meteora_core.bench.shapes import SHAPES, ModelShape
from meteora_core.bench.timing import Timing
from meteora_core.bench.tuning import Tuning, tune

__all__ = [
    "SHAPES",
    "EndToEnd",
    "LayerBench",
    "LayerRow",
    "ModelShape",
    "ModelSizes",
    "Setting",
    "Timing",
    "Tuning",
    "bench_end_to_end",
    "bench_layers",
    "plot_layers",
    "tune",
]
