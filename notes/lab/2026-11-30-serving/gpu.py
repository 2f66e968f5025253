"""The server's scheduler on a GPU: tokens per second of 64 concurrent requests, then answers of mixed requests against each alone.

`gpu.py [--layers L] [--equal SHAPE:LAYERS ...] [--seconds S] [--profile]`; a shape is `tiny` or one of `meteora_core.bench.SHAPES`. Weights, adapters and gates are
random. It prints one line of JSON per result and appends it to $OUT/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from meteora_core import attach, fuse
from meteora_core.bench import SHAPES, ModelShape
from meteora_core.bench.end_to_end import random_bank, random_model
from meteora_core.fused.fuse import is_fused
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import RoutingOptions
from meteora_core.serving.jobs import Chosen, Failed, Job, StepReport
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.packed import packed_attention
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 4312
"""Half of the tokens per second of vLLM with the base model alone: 64 requests, 32 layers of Llama 3 8B's shapes, one H200."""
TINY = ModelShape("tiny", 256, 128, 512, 4, 2, 4, 1000)


def say(**result: Any) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    with (Path(os.environ.get("OUT", ".")) / "gpu.jsonl").open("a") as file:
        file.write(line + "\n")


def tokenizer_of(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{index}": index for index in range(vocabulary)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="t2")


def made(shape: ModelShape, layers: int, dtype: torch.dtype, *, fused: bool, adapters: int = 28) -> Any:
    torch.manual_seed(0)
    model: Any = random_model(shape, layers, dtype, DEVICE)
    attach(model, random_bank(model, adapters, 8, dtype), top_k=2)
    for _, layer in meteora_layers(model):
        layer.gate.data.normal_(0, layer.in_features**-0.5)
    if fused:
        fuse(model)
    return model


def answer(scheduler: Scheduler, jobs: Sequence[Job]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with packed_attention(scheduler.model):
        for job in jobs:
            scheduler.submit(job)
        while sum(scheduler.load):
            scheduler.step()
    return time.perf_counter() - began


def job_of(ids: Sequence[int], routing: RoutingOptions, routes: Any = "none", **sampling: Any) -> tuple[Job, list[Any]]:
    events: list[Any] = []
    return Job(list(ids), SamplingOptions(ignore_end=True, **sampling), routing, events.append, routes), events


def tokens_of(events: Sequence[Any]) -> list[int]:
    assert not any(isinstance(event, Failed) for event in events), events
    return [event.id for event in events if isinstance(event, Chosen)]


def mixed(names: Sequence[str], count: int, *, mixes: bool = True) -> list[RoutingOptions]:
    """Options of every kind; static mixes only with ``mixes``."""
    draw, options = random.Random(0), []
    for index in range(count):
        top_k, temperature, name = draw.randint(1, 4), draw.choice([0.5, 1.0, 15.0]), draw.choice(names)
        kinds = (
            RoutingOptions(2, 1.0),
            RoutingOptions(top_k, temperature),
            RoutingOptions(forced=name),
            RoutingOptions(top_k, temperature, muted=frozenset([name])),
            RoutingOptions(enabled=False),
            RoutingOptions(weights={names[0]: 0.75, name: 0.5} if name != names[0] else {name: 1.5}),
        )
        options.append(kinds[index % (len(kinds) - (not mixes))])
    return options


def equal(shape: ModelShape, layers: int, kind: str, until: float) -> None:
    """Answers of 64 concurrent requests in float32, by graphs, against those of one request at a time by eager code."""
    model = made(shape, layers, torch.float32, fused=DEVICE.type == "cuda")
    tokenizer, names = tokenizer_of(shape.vocabulary), model.meteora.names
    draw = random.Random(1)
    texts = [[draw.randrange(3, shape.vocabulary) for _ in range(draw.choice([1, 2, 7, 20, 45, 90]))] for _ in range(64)]
    options = [RoutingOptions(2, 1.0)] * 64 if kind == "same" else mixed(names, 64, mixes=kind == "mixes")
    lengths = [12 + 4 * (index % 2) for index in range(64)]
    many = Scheduler(model, tokenizer, SchedulerLimits(max_batch=64, prefix_bytes=0, fixed_steps=True, sample_routes=16))
    one = Scheduler(model, tokenizer, SchedulerLimits(max_batch=1, prefix_bytes=0, fixed_steps=False, sample_routes=10**9))
    pairs = [job_of(ids, routing, max_new_tokens=room) for ids, routing, room in zip(texts, options, lengths, strict=True)]
    seconds = answer(many, [job for job, _ in pairs])
    right, logged, compared = 0, [], 0
    began = time.perf_counter()
    for index, (job, events) in enumerate(pairs):
        if time.perf_counter() > until:
            break
        compared += 1
        again, expected = job_of(job.ids, job.routing, max_new_tokens=lengths[index])
        answer(one, [again])
        right += tokens_of(events) == tokens_of(expected)
        if tokens_of(events) != tokens_of(expected):
            logged.append((index, job.routing.describe(), tokens_of(events)[:6], tokens_of(expected)[:6]))
    graphs = many._fixed is not None and many._fixed.graphs
    say(what="equal", shape=shape.name, layers=layers, options=kind, equal=right, of=compared, graphs=graphs, fused=is_fused(model), seconds=round(seconds, 2), alone=round(time.perf_counter() - began, 2))
    print(*logged[:5], f"{len(logged)} differ", sep="\n", flush=True)


def speed(shape: ModelShape, layers: int, count: int, new: int, *, profile: bool, until: float) -> None:
    """Output tokens per second of ``count`` requests of 128 + ``new`` tokens; a setting begins only before the time ``until``."""
    began = time.perf_counter()
    model = made(shape, layers, torch.bfloat16, fused=DEVICE.type == "cuda")
    tokenizer = tokenizer_of(shape.vocabulary)
    reports: list[StepReport] = []
    limits = SchedulerLimits(max_batch=count, prefix_bytes=0, fixed_steps=True, step_tokens=8192, sample_routes=10**9)
    scheduler = Scheduler(model, tokenizer, limits, reports.append)
    draw = random.Random(2)
    gc.collect()
    gc.freeze()  # as `meteora serve` does
    say(what="made", layers=layers, seconds=round(time.perf_counter() - began, 1), fused=is_fused(model))

    def jobs(routing: Sequence[RoutingOptions], routes: str = "none", **sampling: Any) -> list[tuple[Job, list[Any]]]:
        texts = [[draw.randrange(3, shape.vocabulary) for _ in range(128)] for _ in range(count)]
        return [job_of(ids, each, routes, max_new_tokens=new, **sampling) for ids, each in zip(texts, routing, strict=True)]

    usual, names = [RoutingOptions(2, 1.0)] * count, model.meteora.names
    kinds: list[tuple[str, list[RoutingOptions], dict[str, Any]]] = [
        ("one setting", usual, {}),
        ("routes", usual, {"routes": "mean"}),
        ("mixed", mixed(names, count, mixes=False), {}),
        ("one setting again", usual, {}),
        ("routes of layers", usual, {"routes": "layers"}),
        ("mixed, routes", mixed(names, count, mixes=False), {"routes": "mean"}),
        ("drawn", usual, {"temperature": 1.0}),
        ("drawn, top-p", usual, {"temperature": 1.0, "top_p": 0.9}),
        ("mixed, static mixes too", mixed(names, count), {}),
    ]
    for name, routing, more in kinds:
        for repetition in range(3):
            if time.perf_counter() > until:
                say(what="out of time", before=name, repetition=repetition)
                return
            reports.clear()
            try:
                pairs = jobs(routing, **more)
                seconds = answer(scheduler, [job for job, _ in pairs])
                made_tokens = sum(len(tokens_of(events)) for _, events in pairs)
            except Exception as error:  # the other settings are measured all the same
                traceback.print_exc()
                say(what=name, layers=layers, failed=f"{type(error).__name__}: {error}"[:300])
                break
            steps = sorted(report.seconds * 1e3 for report in reports if not report.read)
            first = sum(report.seconds for report in reports if report.read)
            graphs = scheduler._fixed is not None and scheduler._fixed.graphs
            say(
                what=name, layers=layers, count=count, repetition=repetition, tokens_per_s=round(made_tokens / seconds), seconds=round(seconds, 3),
                prompts=round(first, 3), step_ms=round(steps[len(steps) // 2], 2), graphs=graphs, to_floor=round(made_tokens / seconds / FLOOR, 2),
            )  # fmt: skip
        if profile and name in ("one setting", "mixed"):
            shown(scheduler, [job for job, _ in jobs(routing, **more)], name)


def shown(scheduler: Scheduler, jobs: Sequence[Job], name: str) -> None:
    """Where the time goes: kernels by total time, and the host's functions."""
    import cProfile
    import io
    import pstats

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    host = cProfile.Profile()
    for job in jobs:
        job.sampling = SamplingOptions(max_new_tokens=12, ignore_end=True)
    with watch(activities=[ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [ProfilerActivity.CPU]) as kernels:
        answer(scheduler, jobs)
    table = kernels.key_averages().table(sort_by="self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total", row_limit=40, max_name_column_width=90)
    for job in jobs:
        job._cancelled.clear()
    host.enable()
    answer(scheduler, jobs)
    host.disable()
    text = io.StringIO()
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(30)
    (Path(os.environ.get("OUT", ".")) / f"profile-{name.replace(' ', '-')}.txt").write_text(table + text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--equal", nargs="*", default=[], help="SHAPE:LAYERS of models whose answers are compared.")
    parser.add_argument("--layers", type=int, default=0, help="Number of layers of the model whose speed is measured; 0 measures none.")
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=600.0, help="Time after which nothing new is begun; the comparison gets a third of it.")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    began = time.perf_counter()
    logging.basicConfig(level=logging.WARNING)
    shapes = {**SHAPES, "tiny": TINY}
    torch.backends.cuda.matmul.allow_tf32 = False
    if chosen.layers:
        until = began + chosen.seconds * (2 / 3 if chosen.equal else 1)
        speed(shapes[chosen.shape], chosen.layers, chosen.count, chosen.new, profile=chosen.profile, until=until)
        gc.unfreeze()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    for each in chosen.equal:
        name, _, layers = each.partition(":")
        for kind in ("mixed", "same", "mixes"):
            if time.perf_counter() < began + chosen.seconds:
                equal(shapes[name], int(layers), kind, began + chosen.seconds)


if __name__ == "__main__":
    main()
