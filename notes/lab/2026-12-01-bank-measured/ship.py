"""Writes the statistics of adapters into their folders, as `meteora adapters collect` does: python ship.py BASE ADAPTERS DATA TOKENS NAME..."""

import sys
import time
from pathlib import Path

from meteora_core.living.checkpoints import ChangeOptions
from meteora_core.living.shipping import ship_statistics
from meteora_core.model.base import BaseReference

base, adapters, data, tokens, *names = sys.argv[1:]
for name in names:
    began = time.time()
    if not (Path(adapters) / name / "gate_stats.safetensors").exists():
        header = ship_statistics(
            Path(adapters) / name, name, ChangeOptions(data=Path(data), base=BaseReference(base), tokens=int(tokens), batch_size=32)
        ).header
        print(time.strftime("%H:%M:%S"), name, header.rows, "rows,", header.tokens, f"tokens counted, {time.time() - began:.1f} s", flush=True)
