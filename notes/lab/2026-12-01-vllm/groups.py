"""groups.py FILE [compile PART]: other ways to run the four groups of a Llama-3-8B layer with 8, 64, 256 and 16,384 tokens, in CUDA graphs, weights read from memory.
"groups.py FILE warm" compiles only, "groups.py FILE warmed" measures only.

28 adapters of rank 8, bfloat16, every token's options in a table as in vLLM. Each way is checked against the present one. The base is vLLM's: q, k, v and gate,
up are one product each. "beside": gates, A and routing on a second stream while the library computes the base, then B; the same over an FP8 base. Variants are compiled by several processes
first; then the script waits for the file $GO. Saves FILE after every group. TINY=1: a dry run.
"""
import json, os, subprocess, sys, time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-30-vllm"))
os.environ.setdefault("OUT", "/tmp")
import torch
import torch.nn.functional as F
from paths import DEVICE, DTYPE, GROUPS, N, RANK, SCALE, TINY, attempt, blocks_of, block_of, input_of, present, run, time_row, timed

from meteora_core.integrations.vllm.layout import Block, Shape, weights_of
from meteora_kernels import Routing
from meteora_kernels.group import wide
from meteora_kernels.plan import Row
from meteora_kernels.plan.table import Span
from meteora_kernels.stacked import gate_rows_of
from meteora_kernels.steps.middle import Out, middle
from meteora_kernels.steps.products import library_products
from meteora_kernels.steps.second_stream import on_second_stream
from meteora_kernels.steps.up import up
from meteora_kernels.tile import Tile
from meteora_kernels.token_options import new_options, option_row
from meteora_kernels.types import Form, new_flags

START, FILE = time.time(), Path(sys.argv[1])
LIMIT, PROCESSES = float(os.environ.get("LIMIT", 60)), int(os.environ.get("PROCESSES", 12))
SIZES = (8,) if TINY else (8, 16384, 256, 64)
found = {}


def one(outputs, step, warps, stages, pieces, gate_pieces, tokens=16):
    return f"one launch {outputs} {step} {warps} {stages}; {pieces} {gate_pieces}", Row("one_launch", tokens=Span(1, tokens), pieces=pieces, gate_pieces=gate_pieces, tile=Tile(tokens, outputs, step, warps, stages))


ONE = {
    "gate_up": [(128, 128, 4, 4, 1, 4), (128, 64, 4, 8, 1, 4), (64, 128, 4, 8, 1, 4), (64, 256, 4, 5, 1, 4), (128, 128, 8, 5, 1, 4)],
    "down": [(64, 256, 4, 4, 1, 8), (64, 128, 4, 8, 1, 8), (64, 256, 4, 5, 1, 16), (128, 128, 8, 5, 3, 16)],
    "qkv": [(64, 128, 4, 8, 1, 3), (64, 256, 4, 5, 1, 3), (64, 128, 4, 6, 1, 3), (128, 128, 4, 5, 1, 4)],
    "o": [(64, 128, 4, 8, 1, 8), (64, 128, 4, 8, 1, 16), (64, 256, 4, 5, 1, 8), (64, 256, 4, 5, 1, 16)],
}


def variants(name, tokens, row):
    """Names and rows."""
    if tokens == 8:
        rows = [one(*values) for values in ONE[name]]
        rows.append(("stages + 2", replace(row, tile=row.tile._replace(stages=row.tile.stages + 2))))
        return [*rows, ("packed 1 inline", Row("packed", pieces=1, inline=True))]
    if tokens == 64:
        rows = [one(*values, tokens=64) for values in ([(128, 128, 4, 5, 1, 4), (128, 64, 4, 8, 1, 4), (128, 128, 8, 4, 1, 4)] if name == "gate_up" else [(64, 128, 4, 8, 1, 8), (64, 128, 4, 6, 1, 16)])]
        return [*rows, ("packed 1 inline", Row("packed", pieces=1, inline=True))]
    wide = [(f"wide {pieces} in one launch, {size}", Row("wide", gate_pieces=pieces, tile=Tile(size, 128, 64, 4, 4))) for pieces, size in ((4, 64), (8, 64), (4, 128))]
    if tokens == 256:
        return [("packed rounded", Row("packed")), ("packed 1 inline", Row("packed", pieces=1, inline=True)), ("split 2", Row("split", pieces=2)), ("wide 4", Row("wide", pieces=4)), *wide]
    return [("split", Row("split")), ("split 1", Row("split", pieces=1)), ("wide", Row("wide")), ("wide 1", Row("wide", pieces=1)), ("packed", Row("packed")),
            ("wide 2 in one launch, 64", Row("wide", gate_pieces=2, tile=Tile(64, 128, 64, 4, 4))), ("wide 1 in one launch, 128", Row("wide", gate_pieces=1, tile=Tile(128, 128, 64, 8, 3)))]


def options():
    return Routing(2, 1.0, new_options(16384, option_row(N, 2, 1.0), DEVICE))


FIRST = {  # the first step of the adapters: by the library and one launch that routes, with routing in the last launch, or in one launch of its own
    8: ("library", "inline", (64, 128, 8), (64, 128, 16), (128, 64, 16), (128, 128, 8)),
    64: ("library", "inline", (64, 64, 8), (128, 64, 16)),
    256: ("library", "inline", (128, 64, 8)),
}


def first_step(adapters, flags, views, x, routing, how):
    """The middle of all members (M, members * R), and keywords for ``up``."""
    members, total = adapters.members, adapters.total_rank
    if isinstance(how, tuple):
        size, step, pieces = how
        row = Row("wide", gate_pieces=pieces, tile=Tile(16 if len(x) <= 16 else 64, size, step, 4, 4))
        out = torch.empty(len(x), members * total, dtype=x.dtype, device=x.device)
        group = SimpleNamespace(adapters=adapters, total_rank=total, gate_rows=gate_rows_of(N), flags=flags, views=views)
        wide.launch_before(x, group, routing, row, Out(out, 0, total, total), None)
        return out, {}
    products = library_products(x, adapters.gate, 1)
    down = products[..., gate_rows_of(N) :]
    if how == "inline":
        return down, dict(logits=products, routing=routing)
    return middle(products, down, adapters, routing, max_rank=RANK, dtype=DTYPE), {}


def beside(block, x, routing, how, base=None, together=True):
    """Base and adapters at the same time, or one after the other, then B."""
    adapters, flags, views = (block.group.adapters, block.group.flags, block.group.views) if block.group else (block.adapters, block.flags, block.views)
    with on_second_stream(x) if together else nullcontext(lambda: None) as join:
        down, more = first_step(adapters, flags, views, x, routing, how)
    y = F.linear(x, weights_of(block)) if base is None else base()
    join()
    up(down, adapters, y, y, **more)
    return y


def fp8(name, tokens, part=None):
    """The same over an FP8 base."""
    widths, hidden = tuple(width // SCALE for width in GROUPS[name][0]), GROUPS[name][1] // SCALE * (2 if TINY else 1)
    torch.manual_seed(1)
    blocks, weights = [], []
    for _ in range(1 if TINY or part is not None else max(2, min(8, -(-400_000_000 // (sum(widths) * hidden))))):
        block = Block(Shape(tuple(f"m{index}" for index in range(len(widths))), widths, (RANK,) * N, (2.0,) * N), hidden, torch.empty(0, dtype=DTYPE, device=DEVICE), base=False, wide=False)
        block.rows.normal_(0, hidden**-0.5)
        block.lora_B.normal_(0, 0.05)
        block.flags, block.views = new_flags(block.rows.device), {}
        blocks.append(block)
        weights.append(torch.randn(sum(widths), hidden, device=DEVICE, dtype=DTYPE).to(torch.float8_e4m3fn))
    x, routing = torch.randn(tokens, hidden, dtype=DTYPE, device=DEVICE), options()
    small, one = x.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)

    def base(weight):
        return x @ weight.to(DTYPE).t() if TINY else torch._scaled_mm(small, weight.t(), one, one, out_dtype=DTYPE)

    if part is not None:
        for index, how in enumerate(FIRST[tokens]):
            if index % PROCESSES == part:
                beside(blocks[0], x, routing, how, lambda: base(weights[0]))
        return
    exact = beside(blocks[0], x, routing, "library", lambda: base(weights[0])).float()
    times = {"base": timed(lambda: [base(weight) for weight in weights], len(weights))}
    for how in FIRST[tokens]:
        error = ((beside(blocks[0], x, routing, how, lambda: base(weights[0])).float() - exact).abs().max() / exact.abs().max()).item()
        for label, together in (("beside", True), ("after", False)):
            times[f"{label}, {how}"] = f"wrong: {error:.2g}" if error > 0.02 else timed(lambda: [beside(block, x, routing, how, lambda weight=weight: base(weight), together) for block, weight in zip(blocks, weights)], len(blocks))
        adapters = blocks[0].adapters
        times[f"first step alone, {how}"] = timed(lambda: [first_step(block.adapters, block.flags, block.views, x, routing, how) for block in blocks], len(blocks))
    down, _ = first_step(adapters, blocks[0].flags, blocks[0].views, x, routing, "library")
    y = base(weights[0])
    times["last step alone"] = timed(lambda: [up(down, block.adapters, y, y) for block in blocks], len(blocks))
    show(f"{name} {tokens} FP8", times)


def in_place(block, tokens, row, routing):
    """The path "wide" with x already in its buffer, as norms and activations could write it."""
    x = block.group.wide.new_rows(tokens, block.rows)
    x.copy_(input_of(block, tokens))
    return lambda one: wide.run(x, one.group, routing, row, Form(in_place=True))


def cases():
    for tokens in SIZES:
        for name in ("o",) if TINY else GROUPS:
            yield name, tokens


def compile_some(part):
    index = 0
    for name, tokens in cases():
        block = block_of(name, 0)
        x = input_of(block, tokens)
        for _, row in [("", present(block, tokens)), *variants(name, tokens, present(block, tokens))]:
            if index % PROCESSES == part:
                attempt(block, x, row, options())
            index += 1
        for how in FIRST.get(tokens, ()):
            if index % PROCESSES == part:
                beside(block, x, options(), how)
            index += 1
    for tokens in (8, 64):
        for index, name in enumerate(GROUPS):
            fp8(name, tokens, (part + index) % PROCESSES)


def save(key, value):
    found[key] = value
    FILE.write_text(json.dumps(found, indent=1))


def measure(name, tokens):
    blocks, routing = blocks_of(name), options()
    x, row = input_of(blocks[0], tokens), present(blocks[0], tokens)
    exact = run(blocks[0], x, row, routing).float()
    base = [weights_of(block).clone() for block in blocks]
    times = {"base": timed(lambda: [F.linear(x, weights) for weights in base], len(base)), "present": time_row(blocks, x, row, routing)}
    del base

    def wrong(y):
        error = ((y.float() - exact).abs().max() / exact.abs().max()).item()
        return None if error < 0.02 else f"wrong: {error:.2g}"

    for label, variant in variants(name, tokens, row):
        if time.time() - begin > LIMIT:
            break
        done = attempt(blocks[0], x, variant, routing)
        if done is not True:
            times[label] = done or "cannot run"
        else:
            times[label] = wrong(run(blocks[0], x, variant, routing)) or time_row(blocks, x, variant, routing)
    for how in FIRST.get(tokens, ()):
        times[f"beside, {how}"] = wrong(beside(blocks[0], x, routing, how)) or timed(lambda: [beside(block, x, routing, how) for block in blocks], len(blocks))
    if tokens == 16384:
        call = in_place(blocks[0], tokens, Row("wide"), routing)
        times["wide in place"] = wrong(call(blocks[0])) or timed(lambda: [call(block) for block in blocks], len(blocks))
    best = min((value, label) for label, value in times.items() if isinstance(value, float) and (label == "present" or label.startswith("one launch")))[1]
    if tokens == 8 and best != "present":
        other = dict(variants(name, tokens, row))[best]
        for few in (2, 12):  # no other code than for 8
            some = input_of(blocks[0], few)
            error = ((run(blocks[0], some, other, routing).float() - run(blocks[0], some, row, routing).float()).abs().max() / exact.abs().max()).item()
            times[f"at {few}: present alone"], times[f"at {few}: {best} alone"] = time_row(blocks, some, row, routing), time_row(blocks, some, other, routing) if error < 0.02 else f"wrong: {error:.2g}"
    show(f"{name} {tokens}", {"present row": str(row), **times})


def show(key, times):
    save(key, times)
    numbers = sorted((value, label) for label, value in times.items() if isinstance(value, float) and label != "base" and " alone" not in label)
    wrong = [label for label, value in times.items() if isinstance(value, str) and label != "present row"]
    print(f"[groups] {key}: base {times['base']}, present {times.get('present')};", "; ".join(f"{label}: {value}" for value, label in numbers[:4]), f"; {len(wrong)} not run or wrong" if wrong else "", {label[3:-6]: value for label, value in times.items() if label.startswith("at ")} or "", flush=True)


def main(what):
    if what == "compile":
        return compile_some(int(sys.argv[3]))
    if what != "warmed" and not TINY:
        workers = [subprocess.Popen(["nice", "-n", "19", sys.executable, __file__, str(FILE), "compile", str(part)]) for part in range(PROCESSES)]
        for worker in workers:
            worker.wait()
        print(f"[groups] compiled in {time.time() - START:.0f} s", flush=True)
        if what == "warm":
            return
    while os.environ.get("GO") and not os.path.exists(os.environ["GO"]):
        time.sleep(0.1)
    global begin
    begin = time.time()
    for tokens in SIZES:
        for run_one in (measure, fp8) if tokens <= 64 else (measure,):
            for name in ("o",) if TINY else GROUPS:
                if time.time() - begin < LIMIT:
                    run_one(name, tokens)
    print(f"[groups] measured in {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[2] if len(sys.argv) > 2 else "all")
