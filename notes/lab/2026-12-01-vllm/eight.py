"""eight.py FILE: one launch over an 8-bit base for the four groups of a Llama-3-8B layer with 8, 64, 1 and 128 tokens, in CUDA graphs, weights read from memory.

28 adapters of rank 8, bfloat16, every token's options in a table as in vLLM. "base" is the library's product of 8-bit numbers with scales of one, without
quantising x. Each variant is checked against float32. Steps are counted in 16-bit numbers, of which 8-bit tiles have twice as many. Saves FILE after every group. LIMIT: seconds.
TINY=1: a dry run in the interpreter.
"""
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
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
from meteora_kernels.tile import Tile
from meteora_kernels.token_options import new_options, option_row

START, FILE, LIMIT = time.time(), Path(sys.argv[1]), float(os.environ.get("LIMIT", 55))
SIZES = (8,) if TINY else (8, 64, 1, 128)
found = {}
VARIANTS = {  # outputs, step, warps, stages, pieces of the base, pieces of gates and A
    8: {
        "gate_up": [(128, 64, 4, 8, 1, 4), (64, 128, 4, 8, 1, 4), (128, 128, 8, 5, 1, 4), (64, 256, 4, 5, 1, 4)],
        "down": [(64, 256, 4, 5, 1, 8), (64, 128, 4, 8, 1, 16), (64, 256, 4, 5, 1, 16), (64, 128, 4, 8, 2, 16)],
        "qkv": [(64, 128, 4, 8, 1, 3), (64, 256, 4, 5, 1, 3), (64, 64, 4, 8, 1, 3), (64, 128, 4, 8, 1, 2)],
        "o": [(64, 128, 4, 8, 1, 8), (64, 128, 4, 8, 1, 16), (64, 256, 4, 5, 1, 16), (64, 128, 4, 8, 2, 8)],
    },
    64: {
        "gate_up": [(128, 64, 4, 8, 1, 4), (64, 128, 4, 6, 1, 4), (128, 128, 8, 4, 1, 4)],
        "down": [(64, 128, 4, 6, 1, 8), (64, 128, 4, 6, 1, 16), (64, 64, 4, 8, 1, 16)],
        "qkv": [(64, 128, 4, 7, 1, 3), (64, 64, 4, 8, 1, 3)],
        "o": [(64, 128, 4, 6, 1, 8), (64, 128, 4, 7, 1, 16)],
    },
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


def measure(name, tokens):
    size = sum(GROUPS[name][0]) * GROUPS[name][1]
    pairs = [group_of(name, seed) for seed in range(1 if TINY else max(2, min(12, -(-400_000_000 // size))))]
    groups, (group, block) = [pair[0] for pair in pairs], pairs[0]
    hidden = group.weights.shape[1]
    torch.manual_seed(7)
    x = torch.randn(tokens, hidden, dtype=DTYPE, device=DEVICE)
    x_scale = x.float().abs().amax(1, keepdim=True) / 448
    x8 = (x.float() / x_scale).to(torch.float8_e4m3fn)
    routing, one = Routing(2, 1.0, new_options(256, option_row(N, 2, 1.0), DEVICE)), torch.ones((), device=DEVICE)
    wanted = exact(group, block, x, x8, x_scale)
    first = row_for(group, tokens, 2)
    rows = {"present": first} if first else {}
    for values in VARIANTS.get(tokens, {}).get(name, ()):
        tile = Tile(max(16, tokens), *values[:4])
        rows[" ".join(map(str, values))] = Row("one_launch", tokens=Span(1, tile.tokens), pieces=values[4], gate_pieces=values[5], tile=tile)

    def run(one_group, row):
        return run_eight_bits(x, x8, x_scale, replace(one_group, choices={("eight", tokens, 2): row}), routing)

    def attempt(row):
        try:
            error = ((run(group, row).float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
            return error
        except Exception as failure:
            return repr(failure)[:300]

    with torch.inference_mode(), ThreadPoolExecutor(1 if TINY else 14) as pool:
        errors = dict(zip(rows, pool.map(attempt, rows.values())))
    times = {"base": 0 if TINY else timed(lambda: [torch._scaled_mm(x8, each.weights.t(), one, one, out_dtype=DTYPE) for each in groups], len(groups)), "row": str(first)}
    for label, row in rows.items():
        error = errors[label]
        right = isinstance(error, float) and error < 0.02
        times[label] = timed(lambda: [run(each, row) for each in groups], len(groups)) if right else f"wrong: {error}"
    times["errors"] = {label: error if isinstance(error, str) else round(error, 5) for label, error in errors.items()}
    found[f"{name} {tokens}"] = times
    FILE.write_text(json.dumps(found, indent=1))
    print(f"[eight] {name} {tokens}:", {label: value for label, value in times.items() if label not in ("errors", "row")}, "errors", sorted(times["errors"].values(), key=str)[-1:], f"{time.time() - START:.0f} s", flush=True)


if TINY:
    use(torch.device("cpu"), shipped("h200"))
for tokens in SIZES:
    for name in GROUPS:
        if time.time() - START < LIMIT:
            with torch.inference_mode():
                measure(name, tokens)
