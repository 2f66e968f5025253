"""Decoding of a whole model, fused against the base under torch.compile and against the eager base, all in CUDA graphs.

`decode.py [--seconds S] [--layers L] [--vocabulary V] ROWS...` times eager code of both models for the first number of rows, compiles the base, times, compiles
the fused model, times, and goes on to the next number of rows. What is known is appended to decode.jsonl in $OUT after every step. One token per row, behind
512. "Compiled" is max-autotune without its own graphs, as in the folder 2026-11-30-compiled-models, whose functions this script uses. Triton's cache keeps
compiled kernels, and the folder `decode-tuned` beside it keeps which candidate of each product was the fastest, so a second run compiles in seconds. A run beside
other work (`--warm`) times nothing and uses a temporary folder, so it does not affect later runs. `--at-least-one` compiles both models for the
first number of rows whatever time it takes. With `--lock FILE --processes N`, each of N processes with one number of rows times everything once, when all of them
have compiled, one after the other. The default vocabulary keeps the share that the output layer has in 32 layers.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp() if "--warm" in sys.argv else str(Path.home() / ".triton" / "decode-tuned")

import compiled as earlier
import torch
from torch._inductor import config as inductor

from meteora_core import attach, fuse
from meteora_core.bench import SHAPES, ModelShape
from meteora_core.bench.end_to_end import random_bank, random_model
from meteora_core.bench.timing import medians

DEVICE = earlier.DEVICE
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bfloat16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=0, help="0 for that of Llama-3-8B divided by 32 and multiplied by the layers")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--at-least-one", action="store_true")
    parser.add_argument("--lock", type=Path, help="processes with one lock compile side by side, and time one after the other, when all of them have compiled")
    parser.add_argument("--processes", type=int, default=1, help="the number of processes with the lock")
    parser.add_argument("rows", type=int, nargs="+")
    given = parser.parse_args()
    began, file = time.perf_counter(), Path(os.environ.get("OUT", ".")) / "decode.jsonl"
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    inductor.autotune_num_choices_displayed = 0
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # no effect on bfloat16; keeps the compiler's advice out of the output
    torch._dynamo.config.recompile_limit = 64
    shape = SHAPES["llama3-8b"] if DEVICE.type == "cuda" else ModelShape("tiny", 64, 32, 128, 4, 2, given.layers, 400)
    shape = replace(shape, vocabulary=given.vocabulary or shape.vocabulary * given.layers // shape.layers // 64 * 64 or 64)
    models: dict[str, Any] = {name: random_model(shape, given.layers, DTYPE, DEVICE) for name in ("base", "fused")}
    attach(models["fused"], random_bank(models["fused"], 28, 8, DTYPE), top_k=2)
    groups = fuse(models["fused"]) if DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") else 0
    print(f"{groups} groups, {given.layers} layers, vocabulary {shape.vocabulary}, {time.perf_counter() - began:.0f} s", flush=True)
    kept: dict[str, Any] = {}  # the works own the caches that their graphs read
    for rows in given.rows:
        ids = torch.randint(0, min(400, shape.vocabulary), (rows, earlier.CONTEXT), device=DEVICE)
        if time.perf_counter() - began > given.seconds:
            print(f"{rows}: no time left", flush=True)
            continue
        report: dict[str, Any] = {"rows": rows, "layers": given.layers, "vocabulary": shape.vocabulary}
        plain = {name: earlier.decoder(model, model, ids) for name, model in models.items()}
        first = {name: work() for name, work in plain.items()}
        works = {f"{name}_eager": earlier.capture(work) for name, work in plain.items()}
        kept |= {f"{name} {rows}": work for name, work in plain.items()}
        if not given.lock:
            show(report, works, file, given.warm)
        for name in ("base", "fused"):
            if time.perf_counter() - began > given.seconds and not (given.at_least_one and rows == given.rows[0]):
                print(f"{name} {rows}: no time left", flush=True)
                continue
            try:
                call = torch.compile(models[name], mode=earlier.MODE, fullgraph=True, dynamic=False)
                run = kept[f"{name} {rows} compiled"] = earlier.decoder(models[name], call, ids)
                report[f"{name}_compiled_against_eager"] = earlier.error(earlier.compiled_of(f"{name} {rows}", report, run), first[name])
                works[f"{name}_compiled"] = earlier.capture(run)
            except torch.AcceleratorError as problem:  # the device is of no more use
                print(f"DECODE {rows} {name}: FAILED {str(problem).splitlines()[0]}", flush=True)
                return
            except Exception as problem:
                print(f"DECODE {rows} {name}: FAILED {type(problem).__name__}: {str(problem)[:600]}", flush=True)
                continue
            if not given.lock:
                show(report, works, file, given.warm)
        if given.lock:
            with after_all(given.lock, given.processes):
                show(report, works, file, given.warm)


@contextmanager
def after_all(lock: Path, processes: int) -> Iterator[None]:
    """Wait until this many processes have come here, for two minutes at most, because one may have failed; then until no other of them is in the block."""
    end = time.monotonic() + 120
    with lock.open("a+") as file:
        file.write(".")
        file.flush()
        while lock.stat().st_size < processes and time.monotonic() < end:
            time.sleep(0.05)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def show(report: dict[str, Any], works: dict[str, earlier.Work], file: Path, warm: bool) -> None:
    """Time all works in turn, and print and keep the times and ratios."""
    if not warm:
        times = medians(works, DEVICE, repeats=100, seconds=2.0)
        report |= times
        report |= {f"{one}/{base}": times[one] / times[base] for one in ("fused_eager", "fused_compiled") for base in ("base_eager", "base_compiled") if {one, base} <= set(times)}
        with file.open("a") as out:
            out.write(json.dumps(report) + "\n")
    print(f"DECODE {report['rows']} rows:", {key: round(value, 6) for key, value in report.items()}, flush=True)


if __name__ == "__main__":
    main()
