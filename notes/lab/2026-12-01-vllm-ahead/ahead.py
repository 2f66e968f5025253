"""ahead.py FILE: what it saves to start kernels early (programmatic dependent launch) and to copy what the next group reads into the second-level cache.
Needs the patches of this folder: git apply short-launches.patch early-and-ahead.patch.

Four layers of Llama-3-8B's groups as vLLM runs them (28 adapters of rank 8, options of every token in a table), with norms, an activation and two small kernels for attention between them,
in one CUDA graph, weights read from memory. Microseconds a layer, the best of seven. Every variant's output is compared with the first one's, bit by bit, after 50 replays. "base" multiplies the base
weights alone by the library. LIMIT: seconds. TINY=1: a dry run in the interpreter.
"""
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from meteora_core.integrations.vllm.layout import Block, Shape, weights_of
from meteora_kernels import Routing, run_group
from meteora_kernels.ahead import regions_of
from meteora_kernels.feed.rms_norm import rms_norm, rms_norm_reference
from meteora_kernels.feed.silu_mul import silu_mul, silu_mul_reference
from meteora_kernels.group.eight_bits import EightBits, run_eight_bits
from meteora_kernels.plan import machine
from meteora_kernels.steps import middle as middle_step, up as up_step
from meteora_kernels.token_options import new_options, option_row

START, FILE, LIMIT, TINY = time.time(), Path(sys.argv[1]), float(os.environ.get("LIMIT", 75)), bool(os.environ.get("TINY"))
DEVICE, DTYPE = ("cpu", torch.float16) if TINY else ("cuda", torch.bfloat16)
H, MIDDLE, KV, N, RANK, LAYERS = (64, 128, 64, 4, 2, 1) if TINY else (4096, 14336, 1024, 28, 8, 4)
GROUPS = {"qkv": ((H, KV, KV), H), "o": ((H,), H), "gate_up": ((MIDDLE, MIDDLE), H), "down": ((H,), MIDDLE)}
MB = 1 << 20
VARIANTS = {  # early, bytes
    "as before": (False, 0), "early": (True, 0), "early, 8 MB": (True, 8 * MB), "early, 12 MB": (True, 12 * MB), "early, 16 MB": (True, 16 * MB), "8 MB": (False, 8 * MB),
    "early, 4 MB": (True, 4 * MB), "early, 24 MB": (True, 24 * MB), "as before, again": (False, 0),
}
if TINY:
    VARIANTS = {"as before": (False, 0), "early, 8 MB": (True, 8 * MB)}
found = {}


class Linear:
    def __init__(self, name, layer, eight):
        widths, hidden = GROUPS[name]
        shape = Shape(tuple(f"m{index}" for index in range(len(widths))), widths, (RANK,) * N, (2.0,) * N)
        self.name, self.widths = name, widths
        self.block = Block(shape, hidden, torch.empty(0, dtype=DTYPE, device=DEVICE), base=not eight, wide=not eight)
        torch.manual_seed(layer)
        self.block.rows.normal_(0, hidden**-0.5)
        self.block.lora_B.normal_(0, 0.05)
        self.block.place_up()
        if eight:
            weights = (torch.randn(sum(widths), hidden, device=DEVICE, dtype=DTYPE) * hidden**-0.5 * 64).to(torch.float8_e4m3fn)
            self.group, self.weights, self.gates = EightBits.of(weights, torch.full((1,), 1 / 64, device=DEVICE), self.block.adapters), weights, self.block.rows
        else:
            self.group, self.weights, self.gates = self.block.group, weights_of(self.block), self.block.rows[sum(widths) :]
        self.eight = eight

    def __call__(self, x, routing, base=False):
        if base:
            return torch._scaled_mm(*quantised(x)[:1], self.weights.t(), *self.ones(x), out_dtype=DTYPE) if self.eight else F.linear(x, self.weights)
        if not self.eight:
            return run_group(x, self.group, routing)
        return run_eight_bits(x, *quantised(x), self.group, routing)

    def ones(self, x):
        return torch.ones((), device=x.device), torch.ones((), device=x.device)


def quantised(x):
    """Like a kernel of vLLM, one launch: the scale is constant here."""
    return x.to(torch.float8_e4m3fn), ONE


def norm(x):
    if TINY:
        return rms_norm_reference(x, WEIGHT[: x.shape[1]], 1e-5)
    out = torch.empty_like(x)
    rms_norm(x, WEIGHT[: x.shape[1]], 1e-5, out)
    return out


def activation(y):
    half = y.shape[1] // 2
    if TINY:
        return silu_mul_reference(y[:, :half], y[:, half:])
    out = y.new_empty(y.shape[0], half)
    silu_mul(y[:, :half], y[:, half:], out)
    return out


def chain(layers, x, routing, base=False):
    for qkv, o, gate_up, down in layers:
        y = qkv(norm(x), routing, base)
        y = (y[:, :H] * 0.5).clamp(-60, 60)
        x = norm(o(y, routing, base))
        x = norm(down(activation(gate_up(x, routing, base)), routing, base))
    return x


def wire(layers, most):
    flat = [linear for layer in layers for linear in layer]
    for one, other in zip(flat, [*flat[1:], flat[0]]):
        one.group.ahead[:] = regions_of(other.weights, other.gates, most) if most else ()


def graph_of(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def time_of(graph):
    best = float("inf")
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / 10 / LAYERS)
    return round(best, 2)


def set_up(layers, variant):
    machine.EARLY = variant[0]
    wire(layers, variant[1])


def compile_all(layers, tokens):
    """Every kernel of all variants, several at a time."""
    routing = routing_of()

    def one(pair):
        linear, count = pair
        with torch.inference_mode():
            linear(torch.zeros(count, GROUPS[linear.name][1], dtype=DTYPE, device=DEVICE), routing)

    if TINY:  # the interpreter takes one thread
        return
    for variant in [(False, 0), (True, 0), (True, MB * 8), (False, MB * 8)]:
        set_up(layers, variant)
        with ThreadPoolExecutor(14) as pool:
            list(pool.map(one, [(linear, count) for linear in layers[0] for count in tokens]))
    if not TINY:
        torch.cuda.synchronize()


def routing_of():
    return Routing(2, 1.0, new_options(256, option_row(N, 2, 1.0), DEVICE))


def measure(kind, tokens, layers):
    torch.manual_seed(7)
    x, routing, first = torch.randn(tokens, H, dtype=DTYPE, device=DEVICE), routing_of(), None
    times = found.setdefault(f"{kind} {tokens}", {})
    if not TINY:
        graph, _ = graph_of(lambda: chain(layers, x, routing, True))
        times["base"] = time_of(graph)
    for label, variant in VARIANTS.items():
        if time.time() - START > LIMIT:
            break
        set_up(layers, variant)
        try:
            if TINY:
                out = chain(layers, x, routing)
            else:
                graph, out = graph_of(lambda: chain(layers, x, routing))
                times[label] = time_of(graph)
                for _ in range(50):
                    graph.replay()
                torch.cuda.synchronize()
            first = out.clone() if first is None else first
            if not torch.equal(out, first):
                times[label] = f"DIFFERENT: {(out.float() - first.float()).abs().max().item()}"
        except Exception as failure:
            times[label] = repr(failure)[:300]
        FILE.write_text(json.dumps(found, indent=1))
    print(f"[ahead] {kind} {tokens}:", times, f"{time.time() - START:.0f} s", flush=True)


def joined(layers):
    """Whether kernels that start early can be captured behind another stream, a copy and a memset."""
    set_up(layers, (True, 8 * MB))
    x, routing, side = torch.randn(8, H, dtype=DTYPE, device=DEVICE), routing_of(), torch.cuda.Stream()

    def call():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            other = x * 2
        main.wait_stream(side)
        y = layers[0][0](x, routing)
        z = torch.empty_like(y)
        z.copy_(y)
        y = layers[0][1](z[:, :H].contiguous() + other * 0, routing)
        z = torch.zeros_like(y)
        z += y
        return layers[0][1](z, routing)

    wanted = call().clone()
    graph, out = graph_of(call)
    graph.replay()
    torch.cuda.synchronize()
    found["behind other streams"] = bool(torch.equal(out, wanted))
    for linear in layers[0]:  # 256 tokens: some groups use a second stream
        x = torch.randn(256, GROUPS[linear.name][1], dtype=DTYPE, device=DEVICE)
        machine.EARLY = False
        wanted = linear(x, routing).clone()
        machine.EARLY = True
        for paths in (up_step._launches, middle_step._middles):
            paths.known.clear()
        graph, out = graph_of(lambda: linear(x, routing))
        graph.replay()
        torch.cuda.synchronize()
        apart = (out.float() - wanted.float()).norm().item() / wanted.float().norm().item()
        print("[ahead] 256 tokens", linear.name, "apart:", apart, flush=True)
        found["behind other streams"] &= apart < 1e-3
    FILE.write_text(json.dumps(found, indent=1))
    print("[ahead] behind another stream and a copy, equal:", found["behind other streams"], flush=True)


def best():
    """Writes ahead.env beside FILE: the variant with the smallest sum of times that are known for all variants, if its results were equal everywhere."""
    sizes = [times for times in found.values() if isinstance(times, dict) and "as before, again" in times]
    totals = {label: sum(times[label] for times in sizes) for label in VARIANTS if sizes and all(isinstance(times.get(label), float) for times in sizes)}
    early, most = VARIANTS[min(totals, key=totals.get)] if totals and found.get("behind other streams") else (False, 0)
    for file in (FILE.with_name("ahead.env"), Path("/tmp/ahead.env")):
        file.write_text(f"export METEORA_EARLY={int(early)} METEORA_AHEAD={most}\n")
    print("[ahead] together:", {label: round(total, 1) for label, total in totals.items()}, "taken: early", early, "bytes", most, flush=True)


WEIGHT, ONE = torch.ones(MIDDLE, dtype=DTYPE, device=DEVICE), torch.ones(1, device=DEVICE)
with torch.inference_mode():
    for kind, sizes in (("bfloat16", (8, 1, 64)), ("8 bits", (8, 64))) if not TINY else (("float16", (8,)),):
        if time.time() - START < LIMIT - 15 or TINY:
            layers = [[Linear(name, layer, kind == "8 bits") for name in GROUPS] for layer in range(LAYERS)]
            compile_all(layers, sizes)
            print(f"[ahead] {kind}: compiled and run once, {time.time() - START:.0f} s", flush=True)
            for tokens in sizes:
                measure(kind, tokens, layers)
            if kind == "bfloat16":
                try:
                    joined(layers)
                except Exception as failure:
                    print(f"[ahead] behind another stream: {failure!r}"[:600], flush=True)
                best()
