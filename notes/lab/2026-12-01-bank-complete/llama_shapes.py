"""Size and peak memory of the statistics of 28 adapters for the shapes of Llama-3-8B, with random tensors: python llama_shapes.py FOLDER

Writes one whole file of 32 blocks and 28 files of one block, solves the gates of this block, and prints seconds and peak memory.
"""

import subprocess
import sys
from pathlib import Path

import torch

from meteora_core.checkpoints.gate_statistics import Recipe, StatisticsHeader, write_low_rank
from meteora_core.checkpoints.native_config import BaseEntry
from meteora_core.training.sketches import RANK

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
WIDTHS = {"self_attn.q_proj": 4096, "self_attn.o_proj": 4096, "mlp.gate_proj": 4096, "mlp.down_proj": 14336}
SHARED = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}


def written(name: str, blocks: int) -> Path:
    torch.manual_seed(hash(name) % 1000)
    layers = {f"model.layers.{block}.{layer}": width for block in range(blocks) for layer, width in WIDTHS.items()}
    inputs = {layer: layer for layer in layers}
    inputs |= {f"model.layers.{block}.{layer}": f"model.layers.{block}.{first}" for block in range(blocks) for layer, first in SHARED.items()}
    header = StatisticsHeader(adapter=name, base=BaseEntry(name="llama"), recipe=Recipe(), rows=80, tokens=8000, max_length=1024, second="low-rank", inputs=inputs)
    factors = {layer: torch.randn(RANK, width) for layer, width in layers.items()}
    diagonals = {layer: factor.square().sum(0) + 1 for layer, factor in factors.items()}
    return write_low_rank(folder / f"{name}.safetensors", header, {layer: torch.randn(width) for layer, width in layers.items()}, factors, diagonals)


whole = written("whole", 32)
size = whole.stat().st_size
print(f"one adapter: {size / 1e9:.3f} GB, 28 adapters: {28 * size / 1e9:.2f} GB", flush=True)
whole.unlink()
for number in range(28):
    written(f"adapter{number}", 1)
code = (
    "import sys, time, resource; from pathlib import Path; import torch; torch.set_num_threads(2)\n"
    "from meteora_core.checkpoints.gate_statistics import GateStatistics\n"
    "from meteora_core.training.statistics import closed_form_gates\n"
    "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6\n"
    "statistics = [GateStatistics(file) for file in sorted(Path(sys.argv[1]).glob('adapter*.safetensors'))]\n"
    "print(f'loaded: {peak():.2f} GB')\n"
    "began = time.time(); gates = dict(closed_form_gates(statistics, list(statistics[0].header.inputs)))\n"
    "print(f'{len(statistics)} adapters, {len(gates)} gates of one block: {time.time() - began:.1f} s, peak {peak():.2f} GB', {k: tuple(v.shape) for k, v in list(gates.items())[-2:]})\n"
)
subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
