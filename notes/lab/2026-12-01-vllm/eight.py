"""eight.py FILE: one launch over an 8-bit base for the four groups of a Llama-3-8B layer with 8 and 64 tokens, in CUDA graphs, weights read from memory.
Then tiles of the pass that adds B to a finished output (`steps/up.py`), at 256 and 8,192 tokens.

28 adapters of rank 8, bfloat16, every token's options in a table as in vLLM. "base" is the library's product of 8-bit numbers with scales of one, without
quantising x. Each variant's largest error of a token is relative to float32. Steps are counted in 16-bit numbers, of which 8-bit tiles have twice as many. Saves FILE after every group. LIMIT: seconds.
TINY=1: a dry run in the interpreter.
"""
import json, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-30-vllm"))
os.environ.setdefault("OUT", "/tmp")
import torch
from paths import DEVICE, DTYPE, GROUPS, N, RANK, SCALE, TINY, timed

from meteora_core.integrations.vllm.layout import Block, Shape
from meteora_kernels import Adapters, Routing, reference
from meteora_kernels.group.eight_bits import EightBits, row_for, run_eight_bits
from meteora_kernels.plan import Row, use
from meteora_kernels.plan.table import Span, shipped
from meteora_kernels.steps import up as up_step
from meteora_kernels.tile import Tile
from meteora_kernels.token_options import new_options, option_row

START, FILE, LIMIT = time.time(), Path(sys.argv[1]), float(os.environ.get("LIMIT", 55))
SIZES, PROCESSES = ((8,), 0) if TINY else ((8, 64), 6)
found = {}
VARIANTS = {  # outputs, step, warps, stages, pieces of the base, pieces of gates and A
    (8, "gate_up"): [(64, 128, 4, 8, 1, 4), (128, 64, 4, 8, 1, 4)],
    (8, "down"): [(64, 256, 4, 5, 1, 8), (64, 128, 4, 8, 1, 16)],
    (8, "qkv"): [(64, 256, 4, 5, 1, 3), (64, 128, 4, 8, 1, 3)],
    (8, "o"): [(64, 128, 4, 8, 1, 8), (64, 128, 4, 8, 1, 16)],
    (64, "gate_up"): [(128, 64, 4, 8, 1, 4)],
    (64, "down"): [(64, 128, 4, 6, 1, 16)],
    (64, "o"): [(64, 128, 4, 7, 1, 16)],
}


def group_of(name, seed):
    widths, hidden = tuple(width // SCALE for width in GROUPS[name][0]), GROUPS[name][1] // SCALE * (4 if TINY else 1)
    shape = Shape(tuple(f"m{index}" for index in range(len(widths))), widths, (RANK,) * N, (2.0,) * N)
    block = Block(shape, hidden, torch.empty(0, dtype=DTYPE, device=DEVICE), base=False, wide=False)
    torch.manual_seed(seed)
    block.rows.normal_(0, hidden**-0.5)
    block.lora_B.normal_(0, 0.05)
    weights = (torch.randn(sum(widths), hidden, device=DEVICE, dtype=DTYPE) * hidden**-0.5 * 64).to(torch.float8_e4m3fn)
    return EightBits.of(weights, torch.full((1,), 1 / 64, device=DEVICE), block.adapters), block


def exact(group, block, x, x8, x_scale):
    base = (x8.float() * x_scale) @ (group.weights.float() * group.scale).t()
    parts = []
    for part, own in zip(base.split(group.adapters.widths, dim=1), block.single):
        adapters = Adapters.of_layer(own.gate.float(), own.lora_A.float(), own.lora_B.float(), own.scaling, own.offsets)
        parts.append(reference.mix(x.float(), part, adapters, Routing(2))[0])
    return torch.cat(parts, dim=1)


def rows_of(group, name, tokens):
    first = row_for(group, tokens, 2)
    rows = {"present": first} if first else {}
    for values in VARIANTS.get((tokens, name), ()):
        tile = Tile(max(16, tokens), *values[:4])
        rows[" ".join(map(str, values))] = Row("one_launch", tokens=Span(1, tile.tokens), pieces=values[4], gate_pieces=values[5], tile=tile)
    return rows


def inputs(group, tokens):
    torch.manual_seed(7)
    x = torch.randn(tokens, group.weights.shape[1], dtype=DTYPE, device=DEVICE)
    x_scale = x.float().abs().amax(1, keepdim=True) / 448
    return x, (x.float() / x_scale).to(torch.float8_e4m3fn), x_scale, Routing(2, 1.0, new_options(256, option_row(N, 2, 1.0), DEVICE))


def run(group, row, given):
    x, x8, x_scale, routing = given
    return run_eight_bits(x, x8, x_scale, replace(group, choices={("eight", len(x), 2): row}), routing)


def compile_some(part):
    index = 0
    for tokens in SIZES:
        for name in GROUPS:
            group, _ = group_of(name, 0)
            for row in rows_of(group, name, tokens).values():
                if index % PROCESSES == part:
                    try:
                        run(group, row, inputs(group, tokens))
                    except Exception as failure:
                        print(f"[eight] {name} {tokens} {row.tile}: {failure!r}"[:400], flush=True)
                index += 1


def measure(name, tokens):
    size = sum(GROUPS[name][0]) * GROUPS[name][1]
    pairs = [group_of(name, seed) for seed in range(1 if TINY else max(2, min(12, -(-400_000_000 // size))))]
    groups, (group, block) = [pair[0] for pair in pairs], pairs[0]
    given, one = inputs(group, tokens), torch.ones((), device=DEVICE)
    wanted = exact(group, block, *given[:3])
    times = {"base": 0 if TINY else timed(lambda: [torch._scaled_mm(given[1], each.weights.t(), one, one, out_dtype=DTYPE) for each in groups], len(groups))}
    for label, row in rows_of(group, name, tokens).items():
        try:
            error = ((run(group, row, given).float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
            times[label] = (timed(lambda: [run(each, row, given) for each in groups], len(groups)), round(error, 5)) if error < 0.02 else f"wrong: {error}"
        except Exception as failure:
            times[label] = repr(failure)[:300]
    found[f"{name} {tokens}"] = {**times, "row": str(row_for(group, tokens, 2))}
    FILE.write_text(json.dumps(found, indent=1))
    print(f"[eight] {name} {tokens}:", times, f"{time.time() - START:.0f} s", flush=True)


TILES = [(64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 256, 32, 8, 3), (64, 256, 32, 8, 3), (128, 128, 64, 8, 2)]


def ups():
    """Tiles of the pass that adds B, for gate and up and for o; each result is compared with the first one."""
    for name in ("gate_up", "o"):
        group, block = group_of(name, 0)
        for tokens in (256, 8192):
            y = torch.randn(tokens, sum(group.adapters.widths), device=DEVICE, dtype=DTYPE)
            middle = torch.randn(tokens, len(group.adapters.widths) * group.adapters.total_rank, device=DEVICE, dtype=DTYPE) * 0.1
            times, first = {}, None
            for tile in TILES:
                try:
                    up_step.MANY_TILE = tile
                    out = torch.empty_like(y)
                    up_step.up(middle, block.adapters, y, out)
                    first = out if first is None else first
                    times[str(tile)] = timed(lambda: [up_step.up(middle, block.adapters, y, out) for _ in range(4)], 4) if (out.float() - first.float()).abs().max() < 0.1 else "wrong"
                except Exception as failure:
                    times[str(tile)] = repr(failure)[:200]
            up_step.MANY_TILE = TILES[0]
            found[f"up {name} {tokens}"] = times
            FILE.write_text(json.dumps(found, indent=1))
            print(f"[up] {name} {tokens}:", times, f"{time.time() - START:.0f} s", flush=True)


if TINY:
    use(torch.device("cpu"), shipped("h200"))
with torch.inference_mode():
    if sys.argv[2:3] == ["compile"]:
        sys.exit(compile_some(int(sys.argv[3])))
    workers = [subprocess.Popen([sys.executable, __file__, str(FILE), "compile", str(part)]) for part in range(PROCESSES)]
    for worker in workers:
        worker.wait()
    print(f"[eight] compiled after {time.time() - START:.0f} s", flush=True)
    for tokens in SIZES:
        for name in GROUPS:
            if time.time() - START < LIMIT:
                measure(name, tokens)
    if time.time() - START < LIMIT and not TINY:
        ups()
