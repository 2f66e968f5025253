"""Measurement of the kernels' table of choices on the user's GPU: every path that can run is compared with float64 and with the path used now."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench.contenders import Linears, Setting
from meteora_core.bench.shapes import ModelShape
from meteora_core.bench.timing import Work, capture, medians, pairs
from meteora_core.bench.warming import Layer, compile_in_parallel
from meteora_core.errors import UsageError
from meteora_core.files import atomic_write
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import check_range
from meteora_kernels import Adapters, Routing, mix, plan
from meteora_kernels.plan import Case, Facts, Row, Span
from meteora_kernels.plan.choose import user_table
from meteora_kernels.plan.table import format_row, shipped_tables
from meteora_kernels.types import Form

GAIN = 0.98
"""A challenger must take at most this fraction of the incumbent's time, in the first measurement and in the median of the pairs."""
SHARE = 0.75
"""A challenger must be faster in at least this fraction of the pairs."""
PAIRS = 24
MOST_ERROR = 1.6
"""The largest error against float64, as a multiple of the error of the base; it is above 1 because some paths round the output twice."""
SLACK = 2e-6
"""Absolute tolerance that is added to the largest error, for float32."""
CHECKED = 64
"""Number of tokens whose error is computed."""
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of tokens that are measured by default."""
MORE_ROWS = {"layer": (Row("library"),)}
"""Configurations that not every shipped table has, by kind of entry."""
NEAR = 8
"""Configurations of rows for numbers of tokens that are further away, by this factor, are not tried."""


class Clock(Protocol):
    """Methods to time works."""

    def ready(self, work: Work) -> Work:
        """The work in the form in which it is timed, for example as a CUDA graph."""

    def medians(self, works: dict[str, Work]) -> dict[str, float]:
        """Median times in milliseconds of works that run in turn."""

    def pairs(self, one: Work, other: Work) -> list[tuple[float, float]]:
        """Times in milliseconds of two works that run one after the other, several times."""


def lasting_pool() -> tuple[Any, torch.cuda.CUDAGraph]:
    """A memory pool for CUDA graphs, and a graph that keeps it alive."""
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        torch.zeros(1, device="cuda")
    return pool, graph


@dataclass(frozen=True)
class GpuClock:
    """CUDA graphs timed by events. They share memory, and the GPU's cache is filled with other data before each run, as the layers of a model do.

    Attributes:
        device: Device on which works run.
        seconds: Approximate duration of one measurement in seconds.
        pool: Memory pool of the graphs, and a graph that keeps it: a pool whose graphs are all deleted is gone, and capturing into it fails.
        filler: Tensor that is larger than the GPU's cache.
    """

    device: torch.device
    seconds: float = 1.0
    pool: tuple[Any, torch.cuda.CUDAGraph] = field(default_factory=lasting_pool)
    filler: Tensor = field(default_factory=lambda: torch.empty(1 << 26, device="cuda"))

    def fill(self) -> None:
        """Fill the GPU's cache with other data."""
        self.filler.zero_()

    def ready(self, work: Work) -> Work:
        return capture(work, self.pool[0])

    def medians(self, works: dict[str, Work]) -> dict[str, float]:
        return medians(works, self.device, repeats=30, seconds=self.seconds, before=self.fill)

    def pairs(self, one: Work, other: Work) -> list[tuple[float, float]]:
        return pairs(one, other, self.device, PAIRS, self.fill)


@dataclass(frozen=True)
class Trial:
    """A configuration of a path that was tried for one size.

    Attributes:
        row: The path and its block sizes.
        error: Error against float64 as a multiple of the error of the base; None if the path cannot run.
        milliseconds: Median time in milliseconds; None if it was not timed.
        reason: Reason why it was not timed; empty if it was.
    """

    row: Row
    error: float | None
    milliseconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The result for one size.

    Attributes:
        kind: Kind of the entry, "group" or "layer".
        widths: Number of outputs of each member.
        hidden: Width of the input h.
        tokens: Number of tokens M.
        incumbent: Row that the table selects now.
        winner: The incumbent, or the challenger that was faster in the paired recheck.
        ratio: Time of the winner divided by that of the incumbent, the median of the pairs; 1.0 if no challenger was rechecked.
        trials: All configurations that were tried.
    """

    kind: str
    widths: tuple[int, ...]
    hidden: int
    tokens: int
    incumbent: Row
    winner: Row
    ratio: float
    trials: tuple[Trial, ...]


@dataclass
class Tuning:
    """Results of a run.

    Attributes:
        machine: Name of the device.
        file: The user's table that was written; None if nothing changed.
        choices: One result for each size.
    """

    machine: str
    file: Path | None = None
    choices: list[Choice] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The results as a dictionary for JSON: one entry for each size, with the path and time of each trial."""
        return {
            "machine": self.machine,
            "file": None if self.file is None else str(self.file),
            "choices": [
                {
                    "kind": choice.kind,
                    "hidden": choice.hidden,
                    "widths": list(choice.widths),
                    "tokens": choice.tokens,
                    "incumbent": described(choice.incumbent),
                    "winner": described(choice.winner),
                    "ratio": choice.ratio,
                    "trials": [
                        {"row": described(trial.row), "milliseconds": trial.milliseconds, "error": trial.error, "reason": trial.reason}
                        for trial in choice.trials
                    ],
                }
                for choice in self.choices
            ],
        }


def described(row: Row) -> str:
    """The path of a row and its block sizes, in one line."""
    parts = [row.path, row.way, *(f"{name} {getattr(row, name)}" for name in ("pieces", "gate_pieces") if getattr(row, name))]
    if row.tile is not None:
        parts.append("tile " + "x".join(str(size) for size in row.tile[:5]))
    if row.inline:
        parts.append("inline")
    return " ".join(part for part in parts if part)


def configuration(row: Row) -> Row:
    """The row without its conditions on sizes: the path and its block sizes."""
    most = row.tile.tokens if row.path in ("one_launch", "chosen_adapters") and row.tile is not None else plan.EVER
    plain = Row(row.path, Span(most=most), half=row.half, in_place=row.in_place, way=row.way, pieces=row.pieces, gate_pieces=row.gate_pieces, tile=row.tile)
    return replace(plain, inline=row.inline, flat=row.flat)


def candidates(rows: Sequence[Row], case: Case, can_run: dict[str, Any]) -> list[tuple[Row, str]]:
    """Every different configuration among ``rows``, and the reason why it cannot run this case, or "" if it can."""
    found: dict[Row, str] = {}
    for row in map(configuration, rows):
        if row.fits(case):
            found.setdefault(row, can_run[row.path](case, row) or "")
    return list(found.items())


def decide(works: dict[Row, Work], incumbent: Row, clock: Clock) -> tuple[Row, float, dict[Row, float]]:
    """The winner, its time divided by that of the incumbent, and all medians in milliseconds.

    Args:
        works: Works by configuration; all of them are correct, and the incumbent is one of them.
        incumbent: Configuration that is used now, a key of ``works``.
        clock: Clock that times the works.
    """
    ready = {str(index): clock.ready(work) for index, work in enumerate(works.values())}
    names = dict(zip(works, ready, strict=True))
    taken = clock.medians(ready)
    times = {row: taken[name] for row, name in names.items()}
    best = min(times, key=lambda row: times[row])
    if best == incumbent or times[best] > GAIN * times[incumbent]:
        return incumbent, 1.0, times
    ratios = [challenger / own for own, challenger in clock.pairs(ready[names[incumbent]], ready[names[best]])]
    ratio = statistics.median(ratios)
    if ratio > GAIN or sum(one < 1 for one in ratios) < SHARE * len(ratios):
        return incumbent, 1.0, times
    return best, ratio, times


@dataclass(frozen=True)
class Problem:
    """One size to tune.

    Attributes:
        kind: Kind of the entry, "group" or "layer".
        case: Sizes of the call.
        rows: Rows of the table for this kind.
        can_run: Functions that return the reason why a path cannot run, by path.
        work: Function that runs a configuration and returns its output.
        exact: Outputs of the first tokens in float64.
        own: Relative error of the base product, the median over tokens.
    """

    kind: str
    case: Case
    rows: tuple[Row, ...]
    can_run: dict[str, Any]
    work: Callable[[Row], Tensor]
    exact: Tensor
    own: float

    def error(self, row: Row) -> float:
        """The error of a configuration against float64, as a multiple of the error of the base; infinite if two runs differ."""
        output = self.work(row)
        if not torch.equal(self.work(row), output):
            return math.inf
        found = output[: len(self.exact)].double()
        return float(((found - self.exact).norm(dim=1) / self.exact.norm(dim=1)).median()) / self.own

    def candidates(self, shipped: Sequence[Row]) -> list[tuple[Row, str]]:
        """The configurations to try, each with the reason why it cannot run, or "".

        They are those of the row that is taken now, and of all rows whose numbers of tokens are at most :data:`NEAR` times away.
        """
        tokens = self.case.tokens
        near = [row for row in (*self.rows, *shipped) if row.tokens.least <= NEAR * tokens and tokens <= NEAR * row.tokens.most]
        return candidates([plan.choose(self.rows, self.case, self.can_run), *near], self.case, self.can_run)

    def solve(self, shipped: Sequence[Row], clock: Clock) -> Choice:
        """Try all configurations of the table and of ``shipped`` that can run, and choose one."""
        facts = self.case.facts
        taken = plan.choose(self.rows, self.case, self.can_run)
        incumbent = configuration(taken)
        works: dict[Row, Work] = {}
        trials: dict[Row, Trial] = {}
        for row, reason in self.candidates(shipped):
            error = None
            if not reason:
                try:
                    error = self.error(row)
                except (torch.OutOfMemoryError, torch.AcceleratorError):
                    raise
                except Exception as broken:
                    reason = f"cannot be built here: {str(broken).splitlines()[0] if str(broken) else type(broken).__name__}"
            if error is not None and not error * self.own <= MOST_ERROR * self.own + SLACK:
                reason = "its error against float64 is too large" if error < math.inf else "two runs differ"
            trials[row] = Trial(row, error, None, reason)
            if not reason:
                works[row] = lambda row=row: self.work(row)  # type: ignore[misc]
        if incumbent not in works:
            raise UsageError(f"{described(incumbent)}, which is taken now, cannot be tuned: {trials[incumbent].reason}", hint="report this with the GPU's name")
        winner, ratio, times = decide(works, incumbent, clock)
        found = tuple(replace(trial, milliseconds=times.get(row)) for row, trial in trials.items())
        return Choice(self.kind, facts.widths, facts.hidden, self.case.tokens, taken, taken if winner == incumbent else winner, ratio, found)


def problem_of(kind: str, linears: Linears, tokens: int, setting: Setting) -> Problem:
    """The problem for a fused group, or for the adapters of its first linear."""
    return group_problem(linears, tokens, setting) if kind == "group" else layer_problem(linears, tokens, setting)


def shipped_rows(kind: str) -> list[Row]:
    """The rows of all shipped tables for "group" or "layer", and those of :data:`MORE_ROWS`."""
    return [*(row for table in shipped_tables() for row in (table.group if kind == "group" else table.layer)), *MORE_ROWS.get(kind, ())]


def runs_of(kind: str, linears: Linears, tokens: int, setting: Setting) -> list[Work]:
    """A work for each configuration that can run this size."""
    problem = problem_of(kind, linears, tokens, setting)
    return [lambda row=row: problem.work(row) for row, reason in problem.candidates(shipped_rows(kind)) if not reason]  # type: ignore[misc]


def group_problem(linears: Linears, tokens: int, setting: Setting) -> Problem:
    """The problem for a fused group, with its input in the form in which a fused model passes it."""
    from meteora_kernels.group import CAN_RUN, PATHS

    group = linears.group
    assert group is not None
    x = torch.randn(tokens, linears.hidden, device=group.weights.device).to(group.weights.dtype)
    window = group.wide.new_rows(tokens, x).copy_(x) if group.wide is not None and linears.fed else None
    case = Case(group.facts, tokens, setting.top_k, window is not None, plan.readable(x) and group.aligned)

    def work(row: Row) -> Tensor:
        in_place = window is not None and row.path == "wide"
        given = window if in_place and window is not None else x
        output: Tensor = PATHS[row.path].run(given, group, Routing(setting.top_k), row, Form(in_place))
        return output

    exact, own = reference_of(linears, x, setting)
    return Problem("group", case, plan.table_of(x.device).group, CAN_RUN, work, exact, own)


def layer_problem(linears: Linears, tokens: int, setting: Setting) -> Problem:
    """The problem for the adapters of the first linear of a group, on top of a finished base output."""
    from meteora_kernels.layer import CAN_RUN, run

    linear = linears.linears[0]
    adapters = Adapters.of_layer(linear.gate, linear.lora_A, linear.lora_B, linear.scaling, linear.offsets, setting.rank)
    x = torch.randn(tokens, linears.hidden, device=linear.weight.device).to(linear.weight.dtype)
    base = F.linear(x, linear.weight)
    facts = Facts(linears.hidden, adapters.widths, setting.adapters, adapters.total_rank, setting.rank, x.dtype, x.device)
    exact, own = reference_of(Linears(linears.hidden, [linear]), x, setting)
    rows = plan.table_of(x.device).layer
    return Problem(
        "layer", Case(facts, tokens, setting.top_k), rows, CAN_RUN, lambda row: run(row, x, None, base, adapters, Routing(setting.top_k))[0], exact, own
    )


def reference_of(linears: Linears, x: Tensor, setting: Setting) -> tuple[Tensor, float]:
    """The outputs of the first tokens in float64, and the relative error of the base product in the dtype of x."""
    few = x[:CHECKED].double()
    bases = [F.linear(few, linear.weight.double()) for linear in linears.linears]
    wholes = []
    for linear, base in zip(linears.linears, bases, strict=True):
        adapters = Adapters.of_layer(linear.gate.double(), linear.lora_A.double(), linear.lora_B.double(), linear.scaling, linear.offsets)
        wholes.append(mix(few, base, adapters, Routing(setting.top_k), backend="reference"))
    got = torch.cat([F.linear(x[:CHECKED], linear.weight) for linear in linears.linears], dim=1).double()
    exact = torch.cat(bases, dim=1)
    own = float(((got - exact).norm(dim=1) / exact.norm(dim=1)).median())
    return torch.cat(wholes, dim=1), max(own, 1e-12)  # type: ignore[arg-type]


def row_to_write(choice: Choice, below: int, facts: Facts, top_k: int, measured: str) -> Row:
    """The entry for a winner: for exactly these sizes, and from the geometric mean of the next smaller number of tokens that was measured and this number."""
    least = max(below + 1, math.isqrt(below * choice.tokens)) if below else choice.tokens

    def only(size: int) -> Span:
        return Span(size, size)

    return replace(
        choice.winner,
        tokens=Span(least, choice.tokens),
        hidden=only(facts.hidden),
        outputs=only(sum(facts.widths)),
        total_rank=only(facts.total_rank),
        max_rank=only(facts.max_rank),
        adapters=only(facts.adapters),
        top_k=only(top_k),
        measured=f"{measured}, {choice.ratio:.3f} of {choice.incumbent.path}",
    )


def tune(
    shape: ModelShape,
    setting: Setting,
    tokens: Sequence[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
    clock: Clock | None = None,
    progress: Progress = SILENT,
) -> Tuning:
    """Measure every path that can run on this GPU, and write entries to the user's table for sizes where another path is faster than the one used now.

    A path must be correct: close to float64, and bit-equal in two runs. The path that is used now stays unless a challenger is faster by 2 % in the median
    of all rounds, and again in pairs that run one after the other.

    Args:
        shape: Shape of the model.
        setting: Number and rank of the adapters, and top-k.
        tokens: Numbers of tokens.
        dtype: Dtype of weights and inputs.
        device: A CUDA device.
        clock: Clock that times the works; None for CUDA graphs and events.
        progress: Receiver of progress reports.

    Returns:
        The configurations that were tried and chosen. This process uses the new table from then on.

    Raises:
        UsageError: A number is out of range, or no table is wanted (METEORA_KERNEL_TABLE is empty).
        StorageError: The table cannot be written.
    """
    counts = sorted(set(tokens))
    for count in counts:
        check_range("tokens", count, 1, 1 << 20)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = plan.user_file(machine)
    if file is None:
        raise UsageError("METEORA_KERNEL_TABLE is empty, so no table can be written", hint="unset it, or set it to a file")
    layer = Layer(shape, setting, dtype, device)
    linears = layer.make()
    jobs = [(kind, index, count) for kind in ("group", "layer") for index in range(len(linears)) for count in counts]
    if clock is None:
        compile_in_parallel(layer, jobs, runs_of, progress)
        clock = GpuClock(device)
    tuning, rows = Tuning(machine), {"group": list[Row](), "layer": list[Row]()}
    with torch.no_grad(), progress.task("tuning", total=len(jobs), unit="sizes") as task:
        for kind, index, count in jobs:
            problem = problem_of(kind, linears[index], count, setting)
            choice = problem.solve(shipped_rows(kind), clock)
            tuning.choices.append(choice)
            if choice.winner is not choice.incumbent:
                below = max((other for other in counts if other < count), default=0)
                rows[kind].append(row_to_write(choice, below, problem.case.facts, setting.top_k, f"by bench-kernels --tune on {machine}"))
            task.update(1)
    if any(rows.values()):
        write_table(file, machine, rows)
        tuning.file = file
        plan.use(device, None)
    return tuning


def write_table(file: Path, machine: str, rows: dict[str, list[Row]]) -> None:
    """Write new entries, followed by those of the user's table that they do not replace."""
    before = user_table(machine)
    parts = [
        f"# Written by `meteora bench-kernels --tune` on {machine}. These entries come before those that Meteora ships; without this file only those are used."
    ]
    for kind, found in rows.items():
        old = [] if before is None else list(getattr(before, kind))
        sizes = {conditions(row) for row in found}
        parts += [f"[[{kind}]]\n{format_row(row)}" for row in [*found, *(row for row in old if conditions(row) not in sizes)]]
    with atomic_write(file) as out:
        out.write("\n\n".join(parts) + "\n")


def conditions(row: Row) -> tuple[Span, ...]:
    """The conditions of an entry on sizes."""
    return row.tokens, row.hidden, row.outputs, row.total_rank, row.max_rank, row.adapters, row.top_k
