"""Microseconds of every kernel of a fused layer of Llama-3-8B, by the profiler: `profile_kernels.py [ADAPTERSxTOKENS...]`; writes kernels.json to $OUT.

Needs the folders 2026-11-29-many-adapters and 2026-11-30-random-sizes on the path.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from common import SHAPES, Group
from mixed import group_of
from torch.profiler import ProfilerActivity, profile

from meteora_kernels import Routing, run_group
from meteora_kernels.group import reads_in_place, row_for

SIZES = ["28x512", "28x4096", "256x8", "256x64", "256x512", "256x4096", "1024x1", "1024x8", "1024x64", "1024x512", "1024x4096"]


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for size in sys.argv[1:] or SIZES:
        count, tokens = map(int, size.split("x"))
        for name, (widths, hidden) in SHAPES.items():
            group = Group(name, count, 8)
            fused = group_of([8] * count, hidden, widths) if count <= 32 else group.fused
            for kind, pool in (("uniform", 0), ("local", 16)) if count > 32 else (("uniform", 0),):
                x = group.input(tokens, pool)
                here = reads_in_place(fused, tokens, 2)
                if here and fused.wide is not None:
                    x = fused.wide.new_rows(tokens, x).copy_(x)
                for _ in range(2):
                    run_group(x, fused, Routing(2), in_place=here)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as records:
                    for _ in range(5):
                        flush.zero_()
                        run_group(x, fused, Routing(2), in_place=here)
                    torch.cuda.synchronize()
                row = row_for(fused, tokens, 2, in_place=here, aligned=tokens > 16)
                each = {
                    e.key[:60]: e.self_device_time_total / 5
                    for e in records.key_averages()
                    if e.self_device_time_total and "fill" not in e.key.lower() and "memset" not in e.key.lower()
                }
                found[f"{size} {kind} {name}"] = each
                print(
                    size,
                    kind,
                    name,
                    row.path,
                    row.way,
                    f"{sum(each.values()):.1f}",
                    {key: round(value, 1) for key, value in sorted(each.items(), key=lambda i: -i[1])},
                    flush=True,
                )
            del group, fused
            torch.cuda.empty_cache()
        (Path(os.environ.get("OUT", ".")) / "kernels.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
