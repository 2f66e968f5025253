"""Collection of one adapter's gate statistics, and closed-form gates from the statistics of several adapters.

The gates of a bank are the ridge solution over the rows of all adapters (:mod:`meteora_core.training.ridge`). Each token runs with its own adapter, so the
sums over the tokens of one adapter do not depend on the other adapters. Statistics are therefore collected with one adapter attached, and the gates of a
bank depend only on the statistics of its adapters: adding and removing other adapters in between does not change a bit of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank, natural_order
from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.checkpoints.gate_statistics import (
    GateStatistics,
    Recipe,
    Second,
    StatisticsHeader,
    join_statistics,
    unpacked,
    write_low_rank,
    write_statistics,
)
from meteora_core.checkpoints.native_config import BaseEntry
from meteora_core.choices import SecondMoments
from meteora_core.errors import CheckpointError, DataError, MeteoraError
from meteora_core.files import storage_errors
from meteora_core.locks import scratch_folder
from meteora_core.model.attach import attach, detach, meteora_layers, probe_base
from meteora_core.model.base import BaseReference
from meteora_core.model.tokens import check_observable, is_head, is_output_layer
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE
from meteora_core.text import listed
from meteora_core.training.batch_plan import plan_batches
from meteora_core.training.encoding import TrainRow, row_lengths
from meteora_core.training.input_sums import InputSums, Pass, Run, Way, passes_of, sum_inputs
from meteora_core.training.ridge import ridge_rows, ridge_rows_low_rank
from meteora_core.training.sketches import SketchedSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8_000
"""Number of tokens from which an adapter's statistics are collected, unless its rows have fewer."""

PROMPT_EVERY = 4
"""The statistics count one of every :data:`PROMPT_EVERY` prompt tokens."""

BASE_ROUTE = 1.0
"""Weight of the base route in closed-form gates; every adapter has a weight of 1.

With a smaller weight, more tokens go to the right adapter, but the loss on answers and on general questions is higher.
"""

MEMORY = 2 << 30
"""Default of the maximum size of the sums of one pass, in bytes."""


WHOLE = 512 << 20
"""Maximum size, in bytes, of the whole second moments of all linear layers' inputs with which the form "auto" stores them whole."""


@dataclass(frozen=True)
class Collecting:
    """Parameters of the collection of statistics.

    Attributes:
        base: The base model; the statistics record its name and revision.
        pad_token: Token id of the padding.
        recipe: Parameters that the statistics of all adapters of a bank must share.
        tokens: Approximate number of tokens that run through the model, in the runs with the adapter and on the base model alone together.
        batch_size: Number of rows in one forward pass.
        max_length: Maximum row length in tokens; it is recorded.
        seed: Seed of the choice of rows.
        second: The form in which second moments are stored: "auto" (see :func:`stored_form`), or a form of
            :func:`meteora_core.checkpoints.gate_statistics.write_statistics` or :func:`~meteora_core.checkpoints.gate_statistics.write_low_rank`.
        backend: Backend of the sum over adapters.
        memory: Maximum size of the sums in bytes. Models that need more run several times, each time for a part of the inputs.
        prompt_every: One of this many prompt tokens of a row counts; the others only run. Prompts have many tokens and little of the weight. All count if
            the recipe has no answer share.
        half_precision: Whether a float32 model on a CPU computes linear layers in bfloat16 if the CPU has instructions for it.
    """

    base: BaseReference
    pad_token: int
    recipe: Recipe
    tokens: int = TOKENS
    batch_size: int = 8
    max_length: int = 1024
    seed: int = 42
    second: SecondMoments = "auto"
    backend: str = "auto"
    memory: int = MEMORY
    prompt_every: int = PROMPT_EVERY
    half_precision: bool = True


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    bank: AdapterBank,
    rows: Sequence[TrainRow],
    file: Path,
    how: Collecting,
    *,
    layers: Sequence[str] = (),
    progress: Progress = SILENT,
) -> GateStatistics:
    """Run an adapter's rows through the base model with that adapter, and write the statistics of the layers' inputs.

    Args:
        model: The base model without adapters; it has none afterwards either.
        bank: Bank with this adapter only, or with the base route only (:func:`meteora_core.adapters.base_route.base_route`).
        rows: Rows of the adapter. All labelled tokens of a row must have the same label; its value does not matter.
        file: File that the statistics are written to.
        how: Parameters of the collection.
        layers: Paths of further linear layers to observe, which other adapters target.
        progress: Object that progress is reported to.

    Returns:
        The statistics, as they were written.

    Raises:
        AdapterError: The adapter does not fit the model.
        DataError: There are no rows, or a row belongs to several adapters (a composite).
        UsageError: Adapters are attached already, or the adapter targets single experts of a mixture of experts.
        MeteoraError: The sums do not fit in memory.
        StorageError: The disk is full or not writable.
    """
    (info,) = bank.adapters
    if not rows:
        raise DataError(f"adapter {info.name!r} has no rows", hint="add some with `meteora data add`")
    rows = [_own_row(row, info.name) for row in rows]
    probe = whole_probe(model)
    attach(model, bank, top_k=1, backend=how.backend, init="zeros")
    try:
        own = dict(meteora_layers(model))
        observed: dict[str, nn.Module] = {path: model.get_submodule(path) for path in sorted({*own, *layers}, key=natural_order)}
        check_observable(observed, "the collection of gate statistics")
        bare = how.recipe.bare_share if own else 0.0  # without adapters, both runs are the same
        runs = _runs(_planned(row_lengths(rows), how), bare)
        used = [_counted(row, number, how) for number, row in enumerate(rows)]
        work = passes_of([Run(way, share, [[used[row] for row in batch] for batch in plan]) for way, share, plan in runs], 1, how.recipe.answer_share)
        seen = [used[row] for row in {row for _, _, plan in runs for batch in plan for row in batch}]
        tokens = sum(label != IGNORE for row in seen for label in row.gate_labels)
        header = StatisticsHeader(
            adapter=info.name,
            adapter_sha256=info.sha256,
            base=BaseEntry(name=how.base.name, revision=how.base.revision, probe=probe),
            recipe=how.recipe,
            rows=len(seen),
            tokens=tokens,
            max_length=how.max_length,
            second=stored_form(model, how.second),
            inputs=dict.fromkeys(observed, ""),
        )
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(file.parent, f"{file.name}.parts") as folder:
            return join_statistics(list(_passes(model, observed, work, header, folder, how, progress)), file)
    finally:
        detach(model)


def _passes(
    model: nn.Module,
    observed: Mapping[str, nn.Module],
    work: Sequence[Pass],
    header: StatisticsHeader,
    folder: Path,
    how: Collecting,
    progress: Progress,
) -> Iterator[GateStatistics]:
    """Run the rows through the model in as many passes as the memory for the sums requires, and write the statistics of each pass to a file."""
    names = {id(module): path for path, module in observed.items()}
    done: set[int] = set()
    while True:
        sums = (SketchedSums if header.second == "low-rank" else InputSums)(1, work[0].table, how.memory, done)
        _run(model, sums, observed, work, how, f"{header.adapter}: statistics", progress)
        inputs = {path: names[sums.of[id(module)]] for path, module in observed.items() if sums.of.get(id(module)) in sums.squares}
        means = {names[key]: mean[0] for key, mean in sums.means.items()}
        part = folder / f"{len(done)}.safetensors"
        part_header = header.model_copy(update={"inputs": inputs})
        if isinstance(sums, SketchedSums):
            factors = {names[key]: sums.factor(key) for key in sums.squares}
            write_low_rank(part, part_header, means, factors, {names[key]: diagonal for key, diagonal in sums.diagonals.items()})
        else:
            write_statistics(part, part_header, means, {names[key]: square for key, square in sums.squares.items()})
        yield GateStatistics(part)
        done |= sums.squares.keys()
        if not sums.postponed:
            return


def _planned(lengths: Sequence[int], how: Collecting) -> tuple[list[list[int]], int]:
    """Batches of rows in a random order, and the number of batches for which there are enough tokens; there may be fewer, if rows have fewer tokens."""
    wanted = max(1, round(how.tokens * len(lengths) / (sum(lengths) * how.batch_size)))
    picked = set[int]()
    plan: list[list[int]] = []
    for picks in plan_batches([lengths], min(wanted, -(-len(lengths) // how.batch_size)), how.batch_size, how.seed):
        plan.append(sorted({row for _, row in picks} - picked))  # the last batch may draw rows a second time
        picked.update(plan[-1])
    return [batch for batch in plan if batch], wanted


def _runs(planned: tuple[list[list[int]], int], bare: float) -> list[tuple[Way, float, list[list[int]]]]:
    """The runs of an adapter's rows: how they run, their share in the weight, and the batches.

    The batches are divided in proportion to the shares, so that each row runs once. If there are too few rows, some or all of them run both ways.
    """
    plan, wanted = planned
    if not bare:
        return [("own", 1.0, plan)]
    own = min(len(plan), max(1, wanted - round(bare * wanted)))
    return [("own", 1 - bare, plan[:own]), ("base", bare, plan[::-1][: max(1, wanted - own)])]


def _counted(row: TrainRow, number: int, how: Collecting) -> TrainRow:
    """A row in which only one of every ``how.prompt_every`` prompt tokens has a label; which ones depends on the row's number."""
    if how.prompt_every == 1 or how.recipe.answer_share is None or row.response_start >= len(row):
        return row
    kept = (label if place >= row.response_start or (place + number) % how.prompt_every == 0 else IGNORE for place, label in enumerate(row.gate_labels))
    return replace(row, gate_labels=tuple(kept))


def stored_form(model: nn.Module, form: SecondMoments) -> Second:
    """The form in which a model's second moments are stored.

    Args:
        model: The base model.
        form: The wanted form. "auto" is "float32" if the whole second moments of all linear layers take at most :data:`WHOLE` bytes, else "low-rank".
    """
    if form != "auto":
        return form
    widths = [module.in_features for path, module in model.named_modules() if isinstance(module, nn.Linear) and not is_head(model, path)]
    return "float32" if sum(2 * width * (width + 1) for width in widths) <= WHOLE else "low-rank"


def whole_probe(model: nn.Module) -> list[float] | None:
    """A few weights of a model without adapters, from which statistics recognise it; they do not depend on the layers that adapters target."""
    return probe_base({path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)})


def _own_row(row: TrainRow, name: str) -> TrainRow:
    """A row with the labels of a bank that contains only this adapter. Raises DataError for a row that belongs to several adapters."""
    if len({*row.gate_labels} - {IGNORE}) > 1:
        raise DataError(f"a row of {name!r} belongs to several adapters; statistics are those of one", hint="use rows of the adapter's own task, no composites")
    return replace(row, gate_labels=tuple(label if label == IGNORE else 0 for label in row.gate_labels))


def _run(model: nn.Module, sums: InputSums, observed: Mapping[str, nn.Module], work: Sequence[Pass], how: Collecting, title: str, progress: Progress) -> None:
    failure = MeteoraError("out of memory while gate statistics are collected", hint="use a device with more memory, or --device cpu")
    whole = any(is_output_layer(model, path) for path in observed)  # the output layer is not part of the decoder
    with sums.observing(observed.values(), failure), progress.task(title, total=len(work), unit="batches") as bar:
        sum_inputs(model, sums, work, how.pad_token, whole=whole, half=how.half_precision, bar=bar)


Sums = Callable[[str], tuple[Tensor, Tensor]]
"""The sums of a layer's input, by the layer's path: the second moments (h, h) and the weighted mean of each adapter (N, h)."""


def closed_form_gates(
    statistics: Sequence[GateStatistics], layers: Sequence[str], *, more: Sums | None = None, progress: Progress = SILENT
) -> Iterator[tuple[str, Tensor]]:
    """The gates of a bank in closed form, one layer after another; the moments of only one layer are in memory at a time.

    Every adapter has the same weight, and the base route has :data:`BASE_ROUTE` of it. The result depends only on the statistics and their order.

    Args:
        statistics: Statistics of every adapter, in the order of the bank.
        layers: Paths of the layers with adapters.
        more: Sums of further runs of the adapters' rows, which are added; every adapter has a total weight of 1 in them.
        progress: Object that progress is reported to.

    Yields:
        The path of a layer and its gate, float32 (N, h) on the CPU.

    Raises:
        CheckpointError: A file is broken or lacks a layer, or the recipes or the widths of the layers differ.
    """
    first = statistics[0]
    for each in statistics:
        if missing := each.missing(layers):
            raise CheckpointError(f"the statistics {each.file} lack layers: {listed(missing)}", hint="collect them again from the adapter's rows")
        if difference := first.header.recipe.difference(each.header.recipe):
            raise CheckpointError(f"the statistics {each.file} have the {difference}", hint="collect them again from the adapter's rows")
    sharing: dict[tuple[str, ...], list[str]] = {}
    for layer in sorted(layers, key=natural_order):
        sharing.setdefault(tuple(each.input_of(layer) for each in statistics), []).append(layer)
    with progress.task("gates: solving", total=len(layers), unit="layers") as bar:
        for group in sharing.values():
            gate = _solve(statistics, group[0], more) * first.header.recipe.scale
            for layer in group:
                yield layer, gate
                bar.update(1)


@torch.no_grad()
def routed_gates(
    model: nn.Module, rows: Sequence[Sequence[TrainRow]], statistics: Sequence[GateStatistics], how: Collecting, *, progress: Progress = SILENT
) -> dict[str, Tensor]:
    """Gates in closed form from the statistics of the adapters, and from rows that run as the model's present gates route them.

    In use, the input of a layer depends on the choices of all layers before it, right and wrong; statistics of single adapters cannot contain such inputs.
    The routed rows have the same weight as the statistics, as in :func:`meteora_core.training.ridge.ridge_gates`.

    Args:
        model: Model with the adapters attached, and gates that choose among them; it is not changed.
        rows: Rows of each adapter, in the order of the bank.
        statistics: Statistics of each adapter, in the same order.
        how: Parameters of the collection. Half of its tokens run, because these rows only complete the statistics.
        progress: Object that progress is reported to.

    Returns:
        The gate of each layer, float32 (N, h) on the CPU, by the layer's path.

    Raises:
        DataError: An adapter has no rows.
        UsageError: An adapter targets single experts of a mixture of experts.
        MeteoraError: The sums do not fit in memory.
    """
    layers, fewer = dict(meteora_layers(model)), replace(how, tokens=-(-how.tokens // 2))
    check_observable(layers, "routed rows")
    batches = []
    for each, found in zip(statistics, rows, strict=True):
        if not found:
            raise DataError(f"adapter {each.name!r} has no rows", hint="add some with `meteora data add`")
        batches += [[_counted(found[row], row, how) for row in batch] for batch in _planned(row_lengths(found), fewer)[0]]
    passes = passes_of([Run("routed", 1.0, batches)], len(statistics), how.recipe.answer_share)
    gates: dict[str, Tensor] = {}
    done: set[int] = set()
    while len(gates) < len(layers):
        sums = InputSums(len(statistics), passes[0].table, how.memory, done)
        _run(model, sums, layers, passes, how, "gates: routed rows", progress)
        summed = {path: layer for path, layer in layers.items() if sums.of[id(layer)] in sums.squares}
        gates |= dict(closed_form_gates(statistics, list(summed), more=partial(_layer_sums, sums, summed), progress=progress))
        done |= sums.squares.keys()
    return gates


def _layer_sums(sums: InputSums, layers: Mapping[str, nn.Module], path: str) -> tuple[Tensor, Tensor]:
    key = sums.of[id(layers[path])]
    return sums.square(key), sums.means[key]


def _solve(statistics: Sequence[GateStatistics], layer: str, more: Sums | None = None) -> Tensor:
    means = [each.mean(layer) for each in statistics]
    if len({len(mean) for mean in means}) > 1:
        raise CheckpointError(
            f"the statistics of {layer} have different widths: {listed(str(len(mean)) for mean in means)}", hint="use those of one base model"
        )
    stacked = torch.stack(means)
    weights = [BASE_ROUTE if each.name == NO_ADAPTER else 1.0 for each in statistics]
    shares = torch.tensor(weights, dtype=torch.float64)
    low = [(each.low_rank(layer), weight) for each, weight in zip(statistics, weights, strict=True) if each.is_low_rank]
    whole = [(each, weight) for each, weight in zip(statistics, weights, strict=True) if not each.is_low_rank]
    if not whole and more is None:
        diagonal = torch.stack([residual * weight for (_, residual), weight in low]).sum(0)
        return ridge_rows_low_rank(torch.cat([factor * weight**0.5 for (factor, _), weight in low]), diagonal, stacked, shares).float()
    packed = torch.zeros(stacked.shape[1] * (stacked.shape[1] + 1) // 2, dtype=torch.float64)
    for each, weight in whole:
        packed.add_(each.packed(layer), alpha=weight)
    total = unpacked(packed)
    del packed
    for (factor, residual), weight in low:
        total.addmm_(factor.t(), factor, alpha=weight)
        total.diagonal().add_(residual, alpha=weight)
    if more is not None:
        square, means_of_runs = more(layer)
        total.add_(square.to(total))
        stacked.add_(means_of_runs.to(stacked))
    return ridge_rows(total, stacked, shares).float()
