"""Benchmarks of the seven linears of one decoder layer, for every number of tokens and contender."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench.contenders import Linears, Setting, gather_bytes, lay_input, local_input, make_layer, run_group
from meteora_core.bench.shapes import ModelShape
from meteora_core.bench.timing import Timing, capture, ceilings, medians, peak_memory
from meteora_core.errors import UsageError
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import check_range
from meteora_kernels import lora_mixture, pick_backend, plan

_log = logging.getLogger(__name__)

_CACHE_BYTES = {"cuda": 100 << 20, "cpu": 48 << 20}
"""Copies of the weights take at least this number of bytes, by type of device, so that no run finds them in a cache."""
_GATHER_LIMIT = 4 << 30
ROUTES = ("uniform", "local")
_CHECKED = 64
"""Number of tokens whose error against float64 is computed."""


@dataclass(frozen=True)
class LayerRow:
    """One contender at one token count.

    Attributes:
        tokens: Number of tokens M.
        name: Name of the contender: base, peft, loop, gather, reference, dense, triton or fused.
        milliseconds: Median time of one layer in milliseconds.
        ratio: Time relative to ``base`` in the same mode.
        gigabytes_per_second: Least number of bytes that must move (weights once, chosen adapters, inputs, outputs), divided by the time, in GB/s.
        roofline: Least possible time at the measured rates of the machine, divided by the time.
        peak_mib: Peak memory in MiB in addition to weights and inputs; None for devices other than CUDA.
        error: Relative error against float64, the median over tokens and the largest over the linears; None with ``backward``.
        mode: Mode of the measurement, "graph" or "eager".
        routes: Kind of routes: "uniform" (every token chooses at random) or "local" (neighbours share their adapters).
    """

    tokens: int
    name: str
    milliseconds: float
    ratio: float
    gigabytes_per_second: float
    roofline: float
    peak_mib: float | None
    error: float | None
    mode: str
    routes: str = "uniform"


@dataclass
class LayerBench:
    """Results of a run.

    Attributes:
        shape, adapters, rank, top_k, dtype, device, backward: The request.
        machine: Name of the device.
        copy_gbps: Measured memory rate in GB/s.
        gemm_tflops: Measured arithmetic rate in TFLOP/s.
        base: Description of the base that the ratios refer to.
        chosen: Backend that ``auto`` picks for each number of tokens, with the reason.
        rows: The measurements.
        skipped: Contenders that did not run, with the reason.
    """

    shape: str
    adapters: int
    rank: int
    top_k: int
    dtype: str
    device: str
    backward: bool
    machine: str
    copy_gbps: float
    gemm_tflops: float
    base: str = ""
    chosen: dict[int, str] = field(default_factory=dict)
    rows: list[LayerRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The results as a dictionary for JSON."""
        return asdict(self)


def machine_name(device: torch.device) -> str:
    """The name of the GPU, or the type of the device and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def bench_layers(
    shape: ModelShape,
    tokens: Sequence[int],
    setting: Setting = Setting(),
    timing: Timing = Timing(),
    *,
    backward: bool = False,
    contenders: Sequence[str] | None = None,
    routes: Sequence[str] = ("uniform",),
    progress: Progress = SILENT,
) -> LayerBench:
    """Time every contender at every number of tokens, in turn, in one process.

    The fused groups get x in the form in which a fused model passes it. For q, k, v, for gate, up and for down, x is in the columns of a wider buffer, into
    which the norms and the activation of the model write it (their time is not counted). For o, x is contiguous, and the time of a copy is counted.

    Args:
        shape: Shape of the model.
        tokens: Numbers of tokens, each at least 1.
        setting: The adapters of the benchmark.
        timing: Dtype, device and time; there is one measurement for each number of tokens, kind of routes and mode.
        backward: Whether to time forward and backward pass together (inputs and gates get gradients; the plain LoRA is trained).
        contenders: Names of contenders to run instead of all; ``base`` always runs.
        routes: Kinds of routes, one run for each: "uniform" chooses at random, "local" lets neighbouring tokens share adapters, as in texts.
        progress: Receiver of progress reports.

    Raises:
        UsageError: A number is out of range, or a contender or a kind of routes is unknown.
    """
    check_range("adapters", setting.adapters, 1, 4096)
    check_range("rank", setting.rank, 1, 65536)
    check_range("top-k", setting.top_k, 1, setting.adapters)
    for count in tokens:
        check_range("tokens", count, 1, 1 << 20)
    if not routes or not set(routes) <= set(ROUTES):
        raise UsageError(f"unknown routes: {', '.join(routes) or 'none given'}", hint=f"choose from: {', '.join(ROUTES)}")
    device, dtype = timing.place, timing.dtype
    names = _contenders(device, dtype, contenders, backward=backward)
    torch.manual_seed(0)
    fused = "fused" in names
    copies = max(1, min(16, -(-_CACHE_BYTES.get(device.type, 48 << 20) // (shape.weights * dtype.itemsize))))
    copy_rate, gemm_rate = ceilings(device, dtype)
    bench = LayerBench(
        shape.name,
        setting.adapters,
        setting.rank,
        setting.top_k,
        str(dtype).removeprefix("torch."),
        str(device),
        backward,
        machine_name(device),
        copy_rate,
        gemm_rate,
    )
    bench.base = f"F.linear for each linear, as transformers' eager code calls it, {'in a CUDA graph' if timing.captured else 'launched one by one'}"
    sets = [make_layer(shape, setting, dtype, device, fused=fused) for _ in range(copies)]
    with progress.task("timing", total=len(tokens) * len(routes), unit="sizes") as task:
        for count in tokens:
            plain = {hidden: torch.randn(count, hidden, device=device).to(dtype) for hidden, _ in shape.groups}
            backend, reason = pick_backend(plain[shape.hidden], setting.adapters, setting.adapters * setting.rank, setting.top_k, training=backward)
            bench.chosen[count] = f"{backend}: {reason}"
            for kind in routes:
                given = [[local_input(group, plain[group.hidden], setting) if kind == "local" else plain[group.hidden] for group in groups] for groups in sets]
                _one_size(bench, shape, setting, timing, sets, given, kind, names)
                task.update(1)
    return bench


def _contenders(device: torch.device, dtype: torch.dtype, asked: Sequence[str] | None, *, backward: bool) -> list[str]:
    known = ["base", "peft", "loop", "gather", "reference", "dense"]
    if plan.why_not_triton(device.type, dtype) is None and device.type == "cuda":
        known += ["triton"] if backward else ["triton", "fused"]
    if backward:
        known = [name for name in known if name not in ("loop", "gather")]
    if asked is None:
        return known
    for name in asked:
        if name not in known:
            raise UsageError(f"cannot time {name!r} here", hint=f"choose from: {', '.join(known)}")
    return ["base", *(name for name in known if name in asked and name != "base")]


def _one_size(
    bench: LayerBench,
    shape: ModelShape,
    setting: Setting,
    timing: Timing,
    sets: list[list[Linears]],
    inputs: list[list[Tensor]],
    routes: str,
    names: list[str],
) -> None:
    """Time one number of tokens with one kind of routes, and add the rows to ``bench``."""
    device, count, itemsize = inputs[0][0].device, inputs[0][0].shape[0], inputs[0][0].element_size()
    eager: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == "gather" and gather_bytes(shape, setting, count, itemsize) > _GATHER_LIMIT:
            bench.skipped.append(f"gather at {count} tokens: its copies need more than {_GATHER_LIMIT >> 30} GiB")
            continue
        eager[name] = _training(name, sets, inputs, setting) if bench.backward else _inference(name, sets, inputs, setting)
    ready: dict[str, dict[str, Callable[[], object]]] = {"graph": {}, "eager": {}}
    for name, work in eager.items():
        if timing.captured and name != "loop":
            ready["graph"][name] = capture(work)
        else:
            ready["eager"][name] = work
    if timing.captured and ready["eager"]:
        ready["eager"] = {"base": eager["base"], **ready["eager"]}
    for mode, works in ready.items():
        if not works:
            continue
        times = medians(works, device, repeats=40, seconds=timing.seconds)
        for name, total in times.items():
            if mode == "eager" and timing.captured and name == "base":
                continue
            milliseconds = total / len(sets)
            flow, work_flops = _least(shape, setting, count, itemsize, name)
            factor = 3 if bench.backward else 1
            least = max(flow / bench.copy_gbps / 1e6, work_flops * factor / bench.gemm_tflops / 1e9)
            bench.rows.append(
                LayerRow(
                    count,
                    name,
                    milliseconds,
                    total / times["base"],
                    flow / milliseconds / 1e6,
                    least / milliseconds,
                    peak_memory(eager[name], device),
                    None if bench.backward else _error(name, sets[0], inputs[0], setting),
                    mode,
                    routes,
                )
            )


def _least(shape: ModelShape, setting: Setting, tokens: int, itemsize: int, name: str) -> tuple[int, int]:
    """The least number of bytes and floating-point operations of the base, plus those of the chosen adapters unless ``name`` is the base."""
    size = sum(tokens * (inputs + sum(outputs)) for inputs, outputs in shape.groups)
    weights, flops = shape.weights, 2 * tokens * shape.weights
    if name != "base":
        both = sum(len(outputs) * inputs + sum(outputs) for inputs, outputs in shape.groups)
        chosen = setting.rank if name == "peft" else setting.rank * setting.top_k
        read = setting.rank if name == "peft" else min(tokens * setting.top_k, setting.adapters) * setting.rank
        gates = 0 if name == "peft" else setting.adapters * sum(len(outputs) * inputs for inputs, outputs in shape.groups)
        weights += read * both + gates
        flops += 2 * tokens * (chosen * both + gates)
    return (size + weights) * itemsize, flops


def _inference(name: str, sets: list[list[Linears]], inputs: list[list[Tensor]], setting: Setting) -> Callable[[], None]:
    laid: dict[tuple[int, int], Tensor] = {}
    jobs = []
    for groups, given in zip(sets, inputs, strict=True):
        for index, (group, x) in enumerate(zip(groups, given, strict=True)):
            if name == "fused":
                x = laid.setdefault((index, id(x)), lay_input(group, x, setting.top_k))
            jobs.append((group, x))

    def work() -> None:
        with torch.no_grad():
            for group, x in jobs:
                run_group(name, group, x, setting)

    return work


def _training(name: str, sets: list[list[Linears]], inputs: list[list[Tensor]], setting: Setting) -> Callable[[], None]:
    """A function that runs forward and backward passes, with gradients of x and of the gates (with a cross-entropy) or of the plain LoRA's A and B."""
    leaves = {id(x): x.detach().clone().requires_grad_() for given in inputs for x in given}
    jobs = []
    for groups, given in zip(sets, inputs, strict=True):
        for group, x in zip(groups, given, strict=True):
            for linear in group.linears:
                gate = linear.gate.detach().clone().requires_grad_()
                one = (linear.one_A.detach().clone().requires_grad_(), linear.one_B.detach().clone().requires_grad_())
                jobs.append((leaves[id(x)], linear, gate, one, torch.randn(x.shape[0], linear.weight.shape[0]).to(linear.weight)))
    labels = torch.zeros(inputs[0][0].shape[0], dtype=torch.int64, device=inputs[0][0].device)

    def work() -> None:
        outputs: list[Tensor] = []
        slopes: list[Tensor | None] = []
        for x, linear, gate, one, slope in jobs:
            output = F.linear(x, linear.weight)
            if name == "peft":
                output = output + F.linear(F.linear(x, one[0]), one[1]) * 2.0
            elif name != "base":
                adapters = (linear.lora_A, linear.lora_B, linear.scaling, linear.offsets)
                output, logits = lora_mixture(x, output, gate, *adapters, top_k=setting.top_k, backend=name, return_logits=True, max_rank=setting.rank)
                outputs.append(F.cross_entropy(logits.float(), labels))
                slopes.append(None)
            outputs.append(output)
            slopes.append(slope)
        torch.autograd.backward(outputs, slopes)
        for x in leaves.values():
            x.grad = None
        for _, _, gate, one, _ in jobs:
            gate.grad = one[0].grad = one[1].grad = None

    return work


def _error(name: str, groups: list[Linears], inputs: list[Tensor], setting: Setting) -> float:
    """Relative error of the outputs against float64 with the same weights: the median over tokens and the largest over the linears."""
    worst = 0.0
    for group, given in zip(groups, inputs, strict=True):
        x = given[:_CHECKED]
        with torch.no_grad():
            outputs = run_group(name, group, lay_input(group, given, setting.top_k) if name == "fused" else given, setting)
        for linear, output in zip(group.linears, outputs, strict=True):
            wide = F.linear(x.double(), linear.weight.double())
            if name == "peft":
                wide = wide + F.linear(F.linear(x.double(), linear.one_A.double()), linear.one_B.double()) * 2.0
            elif name != "base":
                tensors = (linear.gate.double(), linear.lora_A.double(), linear.lora_B.double(), linear.scaling, linear.offsets)
                mixed = lora_mixture(x.double(), wide, *tensors, top_k=setting.top_k, backend="reference")
                assert isinstance(mixed, Tensor)
                wide = mixed
            rows = (output[:_CHECKED].double() - wide).norm(dim=1) / wide.norm(dim=1)
            worst = max(worst, float(rows.median()))
    return worst
