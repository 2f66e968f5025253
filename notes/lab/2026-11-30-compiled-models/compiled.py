"""A whole model, base and fused: decoding by eager and by compiled code, both in a CUDA graph, and a prefill with and without a graph.

`compiled.py [--seconds S] [--layers L] [--vocabulary V] STAGE...` runs the stages in turn until S seconds have passed and writes one JSON file per stage
to $OUT. Compiling takes most of the time, and grows with the layers: 4 layers and a small vocabulary are enough for a ratio.

- `decode-B`: one token for B rows behind 512; the file is written again after every model that was compiled;
- `prefill-M`: a prompt of M tokens, launched one by one, by a graph and by compiled code;
- `host-M`: where the processor's time goes in a fused prefill of M tokens.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import logging
import os
import pstats
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from meteora_core import attach, fuse
from meteora_core.bench import SHAPES, ModelShape
from meteora_core.bench.end_to_end import random_bank, random_model
from meteora_core.bench.timing import capture as capture_on_gpu
from meteora_core.bench.timing import medians

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODE = os.environ.get("MODE", "max-autotune-no-cudagraphs" if DEVICE.type == "cuda" else "default")
"""Inductor's most thorough mode; the script captures the graphs itself, so that no time of the host is in the figures."""
CONTEXT = 512
Work = Callable[[], object]


def capture(work: Work) -> Work:
    """A CUDA graph of the work; without a GPU, where the script can only be tried out, the work itself."""
    return capture_on_gpu(work) if DEVICE.type == "cuda" else work


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def decoder(model: nn.Module, call: Any, ids: Tensor) -> Work:
    """A function that decodes one token for every row of ids by ``call``, which is the model or its compiled form."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 512)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = ids[:, :1].clone()

    def run() -> object:
        with torch.no_grad():
            return call(step, past_key_values=cache, use_cache=True)

    return run


def prefill(call: Any, ids: Tensor) -> Work:
    def run() -> object:
        with torch.no_grad():
            return call(ids, use_cache=False, logits_to_keep=1)

    return run


def compiled_of(name: str, report: dict[str, float], work: Work) -> Any:
    """The result of the first call of compiled code; the time that it takes goes into the report."""
    begin = time.perf_counter()
    result = work()
    synchronize()
    report[f"compile_s_{name}"] = round(time.perf_counter() - begin, 1)
    print(f"compiled {name}: {report[f'compile_s_{name}']} s", flush=True)
    return result


def error(one: Any, other: Any) -> float:
    left, right = one.logits[:, -1].float(), other.logits[:, -1].float()
    return float((left - right).norm() / right.norm())


def decode(models: dict[str, nn.Module], rows: int, seconds: float) -> dict[str, float]:
    """Eager code of both models, then the base compiled, then the fused model; what is known is kept at once, because compiling takes long."""
    report: dict[str, float] = {}
    file = Path(os.environ.get("OUT", ".")) / f"decode-{rows}.json"
    ids = torch.randint(0, 400, (rows, CONTEXT), device=DEVICE)
    works: dict[str, Work] = {}
    kept, first = [], {}  # the works own the caches that their graphs read
    for name, model in models.items():
        plain = decoder(model, model, ids)
        first[name] = plain()
        works[f"{name}_eager"] = capture(plain)
        kept.append(plain)
    for name in ("base", "fused"):
        run = decoder(models[name], torch.compile(models[name], mode=MODE, fullgraph=True, dynamic=False), ids)
        report[f"{name}_compiled_against_eager"] = error(compiled_of(name, report, run), first[name])
        works[f"{name}_compiled"] = capture(run)
        kept.append(run)
        report |= medians(works, DEVICE, repeats=60, seconds=seconds)
        for one in ("fused_eager", "fused_compiled", "base_eager"):
            for base in ("base_eager", "base_compiled"):
                if one in report and base in report and one != base:
                    report[f"{one}/{base}"] = report[one] / report[base]
        file.write_text(json.dumps(report, indent=1))
        print({key: round(value, 4) for key, value in report.items()}, flush=True)
    return report


def prefills(models: dict[str, nn.Module], tokens: int, seconds: float) -> dict[str, float]:
    report: dict[str, float] = {}
    ids = torch.randint(0, 400, (1, tokens), device=DEVICE)
    works: dict[str, Work] = {}
    for name, model in models.items():
        works[f"{name}_eager_launched"] = prefill(model, ids)
        works[f"{name}_eager_graph"] = capture(prefill(model, ids))
        torch._dynamo.reset()
        run = prefill(torch.compile(model, mode=MODE, fullgraph=True, dynamic=False), ids)
        compiled_of(name, report, run)
        works[f"{name}_compiled_launched"] = run
        works[f"{name}_compiled_graph"] = capture(run)
    return report | medians(works, DEVICE, repeats=40, seconds=seconds)


def host(models: dict[str, nn.Module], tokens: int, seconds: float) -> dict[str, Any]:
    """Times of a prefill that launches one by one, and the functions that the processor spends them in."""
    ids = torch.randint(0, 400, (1, tokens), device=DEVICE)
    works = {name: prefill(model, ids) for name, model in models.items()}
    report: dict[str, Any] = medians(works, DEVICE, repeats=30, seconds=seconds)
    for name, run in works.items():
        spent = []
        for _ in range(10):
            synchronize()
            begin = time.perf_counter()
            run()
            spent.append((time.perf_counter() - begin) * 1e3)
        report[f"{name}_host"] = sorted(spent)[5]
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(5):
            run()
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(28)
        report[f"{name}_profile"] = [line[:110] for line in text.getvalue().splitlines() if line.strip()][:34]
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=0, help="0 for that of Llama-3-8B")
    parser.add_argument("--adapters", type=int, default=28)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("stages", nargs="+")
    given = parser.parse_args()
    began, out = time.perf_counter(), Path(os.environ.get("OUT", "."))
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    inductor.autotune_num_choices_displayed = 0
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # no effect on bfloat16; keeps the compiler's advice out of the output
    torch._dynamo.config.recompile_limit = 64
    shape = SHAPES["llama3-8b"] if DEVICE.type == "cuda" else ModelShape("tiny", 64, 32, 128, 4, 2, given.layers, 400)
    shape = replace(shape, vocabulary=given.vocabulary or shape.vocabulary)
    models = {name: random_model(shape, given.layers, torch.bfloat16, DEVICE) for name in ("base", "fused")}
    attach(models["fused"], random_bank(models["fused"], given.adapters, given.rank, torch.bfloat16), top_k=2)
    print(f"{fuse(models['fused']) if DEVICE.type == 'cuda' or os.environ.get('TRITON_INTERPRET') else 0} groups, {given.layers} layers, {time.perf_counter() - began:.0f} s", flush=True)
    runs: dict[str, Any] = {"decode": decode, "prefill": prefills, "host": host}
    for stage in given.stages:
        if time.perf_counter() - began > given.seconds:
            print(f"{stage}: no time left", flush=True)
            continue
        kind, _, size = stage.partition("-")
        try:
            report = runs[kind](models, int(size), 4.0)
        except torch.AcceleratorError as problem:  # the device is of no more use
            print(f"{stage}: {str(problem).splitlines()[0]}", flush=True)
            return
        except Exception as problem:
            report = {"failed": f"{type(problem).__name__}: {str(problem)[:1500]}"}
        (out / f"{stage}.json").write_text(json.dumps(report, indent=1))
        for name, value in report.items():
            if isinstance(value, list):
                print(*value, sep="\n", flush=True)
            else:
                print(f"{stage} {name} {value if isinstance(value, str) else round(value, 4)}", flush=True)
        print(f"{stage}: {time.perf_counter() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
