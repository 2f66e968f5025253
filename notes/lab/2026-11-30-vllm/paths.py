"""paths.py: times of the four groups of a Llama-3-8B layer as vLLM runs them (28 adapters of rank 8, bfloat16), in CUDA graphs, weights read from memory.

First what the table of options costs (allowed=None against a table for every token) and the paths of prefill with and without B^T in the rows of the weights,
then an FP8 base with the adapters after it or at the same time, then variants of decode_chosen_rows at 8 tokens and of all paths at 256 tokens, each checked
against the present row. Variants are compiled by several processes first. Saves $OUT/paths.json after every group. TINY=1: a dry run.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from meteora_core.integrations.vllm.layout import Block, Shape, weights_of
from meteora_kernels import Routing
from meteora_kernels.group import PATHS, row_for
from meteora_kernels.plan import Case, Row
from meteora_kernels.tile import Tile
from meteora_kernels.token_options import new_options, option_row

START, OUT, TINY = time.time(), Path(os.environ.get("OUT", ".")), bool(os.environ.get("TINY"))
LIMIT, PROCESSES = float(os.environ.get("LIMIT", 120)), int(os.environ.get("PROCESSES", 8))
DEVICE, DTYPE = ("cpu", torch.float16) if TINY else ("cuda", torch.bfloat16)
SCALE = 64 if TINY else 1
GROUPS = {"qkv": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate_up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
N, RANK = (4, 2) if TINY else (28, 8)
found = {}


def block_of(name, seed):
    widths, hidden = tuple(width // SCALE for width in GROUPS[name][0]), GROUPS[name][1] // SCALE * (2 if TINY else 1)
    shape = Shape(tuple(f"m{index}" for index in range(len(widths))), widths, (RANK,) * N, (2.0,) * N)
    block = Block(shape, hidden, torch.empty(0, dtype=DTYPE, device=DEVICE), base=True, wide=True)
    torch.manual_seed(seed)
    block.rows.normal_(0, hidden**-0.5)
    block.lora_B.normal_(0, 0.05)
    block.place_up()
    return block


def blocks_of(name):
    size = sum(GROUPS[name][0]) * GROUPS[name][1] * 2
    return [block_of(name, seed) for seed in range(1 if TINY else max(2, min(8, -(-400_000_000 // size))))]


def input_of(block, tokens):
    torch.manual_seed(7)
    return torch.randn(tokens, block.rows.shape[1], dtype=DTYPE, device=DEVICE)


def run(block, x, row, routing):
    return PATHS[row.path].run(x, block.group, routing, row)


def can(block, x, row):
    return PATHS[row.path].can_run(Case(block.group.facts, len(x), 2, False, True), row) is None


def timed(call, count):
    """Microseconds of one of ``count`` calls in a CUDA graph; the best of five."""
    if TINY:
        call()
        return 1.0
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    best = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / 4 / count)
    return round(best, 2)


def time_row(blocks, x, row, routing):
    return timed(lambda: [run(block, x, row, routing) for block in blocks], len(blocks))


def present(block, tokens):
    return row_for(block.group, tokens, 2, aligned=tokens > 16 and block.group.aligned)


def decode_variants(row):
    tile, rows = row.tile, []
    for field, values in {"outputs": (16, 32, 64, 128), "step": (64, 128, 256, 512), "warps": (2, 4, 8), "stages": (3, 4, 5, 6), "gate_step": (128, 256, 512), "down_rows": (4, 8, 16), "down_step": (128, 256, 512)}.items():
        rows += [(f"{field} {value}", replace(row, tile=tile._replace(**{field: value}))) for value in values if value != getattr(tile, field)]
    return rows + [(f"pieces {pieces}", replace(row, pieces=pieces)) for pieces in (1, 2, 8, 16) if pieces != row.pieces]


def many_variants():
    wide = [(f"wide {pieces} pieces in one launch, {tokens} tokens", Row("wide", gate_pieces=pieces, tile=Tile(tokens, 128, 64, 4, 4))) for pieces in (2, 4, 8) for tokens in (64, 128)]
    return [("packed rounded", Row("packed")), ("packed rounded inline", Row("packed", inline=True)), ("packed 1", Row("packed", pieces=1)), ("packed 2", Row("packed", pieces=2)), ("packed 1 inline", Row("packed", pieces=1, inline=True)),
            ("packed kernel", Row("packed", pieces=1, tile=Tile(128, 128, 64, 8, 4))), ("packed kernel 64", Row("packed", pieces=1, tile=Tile(64, 128, 64, 4, 4))),
            ("split", Row("split")), ("split 2", Row("split", pieces=2)), ("wide", Row("wide")), ("wide 2", Row("wide", pieces=2)), ("wide 4", Row("wide", pieces=4)), *wide,
            ("wide kernel 4", Row("wide", pieces=4, tile=Tile(64, 128, 64, 4, 3))), ("wide kernel 8", Row("wide", pieces=8, tile=Tile(64, 128, 64, 4, 3)))]


def over_fp8(name, tokens, part=None):
    """An FP8 base alone, then with the adapters after it and at the same time; the first step of the adapters by several products."""
    from meteora_core.integrations.vllm.mixing import Layer, added, chosen_down
    from meteora_core.integrations.vllm.runtime import Runtime
    from meteora_kernels.stacked import gate_rows_of
    from meteora_kernels.steps.middle import middle
    from meteora_kernels.steps.products import library_products, products
    from meteora_kernels.steps.second_stream import on_second_stream

    widths, hidden = tuple(width // SCALE for width in GROUPS[name][0]), GROUPS[name][1] // SCALE * (2 if TINY else 1)
    torch.manual_seed(1)
    layers, weights = [], []
    for _ in range(1 if TINY else max(2, min(8, -(-400_000_000 // (sum(widths) * hidden))))):
        block = Block(Shape(tuple(f"m{index}" for index in range(len(widths))), widths, (RANK,) * N, (2.0,) * N), hidden, torch.empty(0, dtype=DTYPE, device=DEVICE), base=False, wide=True)
        block.rows.normal_(0, hidden**-0.5)
        block.lora_B.normal_(0, 0.05)
        layers.append(Layer(block, False, Routing(2, 1.0), True, Runtime()))
        weights.append(torch.randn(sum(widths), hidden, device=DEVICE, dtype=DTYPE).to(torch.float8_e4m3fn))
    x = torch.randn(tokens, hidden, dtype=DTYPE, device=DEVICE)
    small, one = x.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)

    def base(weight):
        return x @ weight.to(DTYPE).t() if TINY else torch._scaled_mm(small, weight.t(), one, one, out_dtype=DTYPE)

    def parts(layer, found):
        adapters = layer.block.adapters
        return middle(found, found[..., gate_rows_of(N):], adapters, layer.routing, max_rank=RANK, dtype=DTYPE)

    firsts = {"linear": lambda layer: chosen_down(layer, x)}
    firsts |= {f"library {pieces}": lambda layer, pieces=pieces: parts(layer, library_products(x, layer.block.rows, pieces)) for pieces in (1, 4, 8)}
    firsts |= {f"kernel {pieces}": lambda layer, pieces=pieces: parts(layer, products(x, layer.block.rows, pieces, Tile(16 if tokens <= 16 else 64, 64, 128, 4, 3))) for pieces in (4, 8, 16)}
    if part is not None:  # compile some of them
        for index, first in enumerate(firsts.values()):
            if index % PROCESSES == part:
                first(layers[0])
        added(layers[0], chosen_down(layers[0], x), base(weights[0]))
        return
    count, times = len(layers), {"base": timed(lambda: [base(weight) for weight in weights], len(layers))}

    def after(first):
        return [added(layer, first(layer), base(weight)) for layer, weight in zip(layers, weights)]

    def at_once(first):
        for layer, weight in zip(layers, weights):
            with on_second_stream(x) as join:
                down = first(layer)
            y = base(weight)
            join()
            added(layer, down, y)

    for label, first in firsts.items():
        times[label] = [timed(lambda: [first(layer) for layer in layers], count), timed(lambda: after(first), count), timed(lambda: at_once(first), count)]
    save(f"{name} over FP8 at {tokens} tokens: first step alone, after the base, at the same time", times)


def plans():
    for tokens in (8, 256):
        for name in GROUPS:
            block = block_of(name, 0)
            row = present(block, tokens)
            yield name, tokens, row, decode_variants(row) if tokens == 8 else many_variants()


def attempt(block, x, row, routing):
    try:
        return can(block, x, row) and run(block, x, row, routing) is not None
    except Exception as error:
        return repr(error)[:80]


def compile_some(part):
    """Run every PROCESSES-th variant once, so that its code is in Triton's cache."""
    index = 0
    for tokens in (8, 64):
        for place, name in enumerate(GROUPS):
            over_fp8(name, tokens, (part + place * 2) % PROCESSES)
    for name, tokens, _, variants in plans():
        block = block_of(name, 0)
        x = input_of(block, tokens)
        for _, row in variants:
            if index % PROCESSES == part:
                attempt(block, x, row, Routing(2, 1.0))
            index += 1
        if time.time() - START > LIMIT / 2:
            break


def save(key, value):
    found[key] = value
    (OUT / "paths.json").write_text(json.dumps(found, indent=1))
    print(key, json.dumps(value), round(time.time() - START, 1), "s", flush=True)


def main():
    workers = [] if TINY else [subprocess.Popen([sys.executable, __file__, "compile", str(part)]) for part in range(PROCESSES)]
    for worker in workers:
        worker.wait()
    print("compiled", round(time.time() - START, 1), "s", flush=True)
    for name in GROUPS:
        blocks, costs = blocks_of(name), {}
        for tokens in (1, 8, 64, 256, 2048):
            if TINY and tokens > 64:
                continue
            x, row = input_of(blocks[0], tokens), present(blocks[0], tokens)
            table = Routing(2, 1.0, new_options(8192, option_row(N, 2, 1.0), DEVICE))
            assert torch.equal(run(blocks[0], x, row, table), run(blocks[0], x, row, Routing(2, 1.0)))
            base = [weights_of(block).clone() for block in blocks]
            costs[tokens] = [row.path, *(time_row(blocks, x, row, routing) for routing in (Routing(2, 1.0), table)), timed(lambda: [F.linear(x, weights) for weights in base], len(base))]
            del base
        for tokens in () if TINY else (512, 8192):
            x, row = input_of(blocks[0], tokens), present(blocks[0], tokens)
            costs[f"{tokens} tokens"] = {"base": timed(lambda: [F.linear(x, weights_of(block)) for block in blocks], len(blocks)), "present": [row.path, time_row(blocks, x, row, Routing(2, 1.0))]}
            for label, other in {"wide": Row("wide"), "split": Row("split"), "split 1": Row("split", pieces=1), "packed": Row("packed")}.items():
                costs[f"{tokens} tokens"][label] = time_row(blocks, x, other, Routing(2, 1.0))
        save(f"{name}: path, us without and with a table of options, base", costs)
        del blocks
    for tokens in (8,) if TINY else (8, 64):
        for name in ("o",) if TINY else GROUPS:
            over_fp8(name, tokens)
    for name, tokens, row, variants in plans():
        blocks = blocks_of(name)
        x, routing = input_of(blocks[0], tokens), Routing(2, 1.0)
        exact = run(blocks[0], x, row, routing).float()
        times = {"present": [time_row(blocks, x, row, routing), str(row)]}
        for label, variant in variants:
            if time.time() - START > LIMIT:
                break
            done = attempt(blocks[0], x, variant, routing)
            if done is not True:
                times[label] = done if isinstance(done, str) else "cannot run"
                continue
            error = ((run(blocks[0], x, variant, routing).float() - exact).abs().max() / exact.abs().max()).item()
            times[label] = time_row(blocks, x, variant, routing) if error < 0.02 else f"wrong: {error:.2g}"
        save(f"{name} at {tokens} tokens", dict(sorted(times.items(), key=lambda pair: pair[1][0] if isinstance(pair[1], list) else pair[1] if isinstance(pair[1], float) else 1e9)))
        if tokens == 8:  # what helped, together
            best = sorted((value, label) for label, value in times.items() if isinstance(value, float) and value < times["present"][0] * 0.995)[:4]
            together, fields = row, set()
            for _, label in best:
                field, value = label.split()
                if field not in fields:
                    fields.add(field)
                    together = replace(together, pieces=int(value)) if field == "pieces" else replace(together, tile=together.tile._replace(**{field: int(value)}))
                    done = attempt(blocks[0], x, together, routing)
                    save(f"{name} at 8 tokens, {sorted(fields)} together", [time_row(blocks, x, together, routing) if done is True else done, str(together)])
        del blocks


if __name__ == "__main__":
    with torch.inference_mode():
        compile_some(int(sys.argv[2])) if len(sys.argv) > 1 else main()
