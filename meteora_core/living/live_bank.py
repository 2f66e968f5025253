"""Adds, updates and removes adapters of a loaded model; its gates are solved again from the statistics of all remaining adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_route import NO_ADAPTER, base_route, real_adapters
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.joining import with_adapter, without_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics
from meteora_core.data.frames import Frame
from meteora_core.errors import UsageError
from meteora_core.fused.fuse import unfuse
from meteora_core.living.collector import Collector
from meteora_core.model.attach import attach, detach, gate_origin, meteora_layers, set_trainable
from meteora_core.names import check_name
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import GateOrigin, find_meteora, meteora_of
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.statistics import closed_form_gates
from meteora_core.training.task_rows import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora_core.adapters.peft_folder import AdapterInfo

CORRECTIONS = (0.0, 0.5, 1.0)
"""The shares of the correction from gradient training or routed rows that are compared when such gates are solved again."""


@dataclass(frozen=True)
class Change:
    """The result of a change to a bank.

    Attributes:
        action: "add", "drop" or "update".
        adapter: Name of the changed adapter.
        adapters: Names of all adapters after the change, in order.
        gates: "solved" if the gates were computed from the statistics of all adapters, "deleted" if only the adapter's row was removed from them.
        exact: Whether the gates are the joint closed form over all adapters.
        correction: Share of the correction from gradient training that was kept, between 0 and 1; None if the gates had not been trained.
        collected: Names of the adapters whose statistics were collected for the change.
        held_out: Measurements on held-out rows (:func:`meteora_core.training.gate_metrics.measure_gates`); empty if there are no rows.
        seconds: Duration in seconds.
    """

    action: str
    adapter: str
    adapters: tuple[str, ...]
    gates: str
    exact: bool
    correction: float | None = None
    collected: tuple[str, ...] = ()
    held_out: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Before:
    """An attached model's bank and routing, from which it can be restored."""

    bank: AdapterBank
    gates: dict[str, Tensor]
    origin: GateOrigin
    top_k: int
    temperature: float
    backend: str
    renamed: dict[str, str]
    embedded: bool
    trainable: bool
    frame: Frame | None


class LiveBank:
    """The bank of a loaded model, whose adapters can be added, updated and removed.

    The model is changed in place and gets a new ``model.meteora``; a fused model is unfused. If a change fails, the model is restored.

    Args:
        model: A model with adapters attached.
        collector: Collector for missing statistics.
        statistics: Existing statistics, by adapter.

    Attributes:
        statistics: Statistics of the bank's adapters, by name; an adapter may have none.
    """

    def __init__(self, model: PreTrainedModel, collector: Collector, statistics: Mapping[str, GateStatistics]) -> None:
        self.model, self.collector, self.statistics = model, collector, dict(statistics)
        self._progress = collector.progress

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return meteora_of(self.model).names

    def add(self, name: str, folder: str | Path) -> Change:
        """Add an adapter at the end of the bank, before the base route if there is one.

        Args:
            name: Name of the new adapter.
            folder: PEFT folder of the adapter. Its statistics (``gate_stats.safetensors``) are used if it contains any; otherwise its rows are needed.

        Raises:
            UsageError: The name is invalid or already used, or the bank contains this adapter under another name.
            AdapterError: The adapter cannot be used, does not fit the model, or its prompts do not have the frame of the other adapters.
            DataError: The rows of the adapter are broken.
            MeteoraError: An adapter has neither statistics nor rows.
        """
        if name in self.names and name != NO_ADAPTER:
            raise UsageError(f"the bank already contains an adapter named {name!r}", hint="use `meteora adapters update`, or choose another name with --name")
        return self._join("add", name, self._read(name, folder), folder=Path(folder))

    def add_base_route(self) -> Change:
        """Add the base route (:mod:`meteora_core.adapters.base_route`) at the end of the bank. Its rows are general text, unless the collector finds others.

        Raises:
            UsageError: The bank has a base route already.
            MeteoraError: An adapter has neither statistics nor rows.
        """
        if NO_ADAPTER in self.names:
            raise UsageError("the bank has a base route already", hint=f"remove it first: meteora adapters drop CHECKPOINT {NO_ADAPTER}")
        return self._join("add", NO_ADAPTER, base_route())

    def update(self, name: str, folder: str | Path) -> Change:
        """Replace an adapter by a new version, at the same index. Arguments and errors are those of :meth:`add`."""
        index = _state_bank(self.model).index(name)
        return self._join("update", name, self._read(name, folder), index, Path(folder))

    def drop(self, name: str) -> Change:
        """Remove an adapter.

        Gates in closed form are solved again from the statistics of the other adapters, as if the bank had never contained the adapter. If the gates were
        trained, or if statistics are missing, only the adapter's row is deleted from each gate.

        Args:
            name: Name of the adapter.

        Raises:
            UsageError: There is no such adapter, or it is the only one besides the base route.
        """
        began, before = time.perf_counter(), _before(self.model)
        bank = before.bank
        bank.index(name)
        refuse_last(bank.adapters, name)
        rest = without_adapter(bank, name)
        statistics = {other: self.statistics[other] for other in rest.names if other in self.statistics}
        gates, exact = gates_without(before.gates, bank.names, name, rest.modules, before.origin, statistics, progress=self._progress)
        with self._restored(before):
            self._attach(before, rest, gates, before.origin)
        self.statistics = statistics
        self.collector.forget(name)
        how = "solved" if exact else "deleted"
        return Change("drop", name, self.names, how, exact, seconds=time.perf_counter() - began)

    def _read(self, name: str, folder: str | Path) -> AdapterBank:
        if name == NO_ADAPTER:
            raise UsageError(f"{name!r} is the name of the base route", hint="choose another name with --name")
        check_name(name, "adapter")
        return AdapterBank.from_peft({name: folder}, progress=self._progress)

    def _join(self, action: str, name: str, new: AdapterBank, index: int | None = None, folder: Path | None = None) -> Change:
        began, before = time.perf_counter(), _before(self.model)
        others = before.bank if index is None else without_adapter(before.bank, name)
        _refuse_twin(new.adapters[0], others.adapters)
        previous = {other: each for other, each in self.statistics.items() if other in before.bank.names}
        with self._restored(before):
            new, renamed = fit_to_base(new, self.model)
            self.collector.forget(name)
            if folder is not None:
                self.collector.folders[name] = folder
            new = self.collector.with_frame(new)
            if index is None and NO_ADAPTER in others.names:
                index = others.index(NO_ADAPTER)  # the base route stays the last entry
            bank = with_adapter(others, new, index)
            statistics, collected = self.collector.complete(self.model, bank, {other: each for other, each in previous.items() if other != name})
            gates = dict(closed_form_gates([statistics[other] for other in bank.names], list(bank.modules), progress=self._progress))
            origin: GateOrigin = "closed form"
            correction = None
            self._attach(replace(before, renamed={**before.renamed, **renamed}, frame=before.frame or new.adapters[0].frame), bank, gates, origin)
            held_out = self.collector.held_out(bank.names)
            if before.origin == "trained" and len(before.bank) > 1:
                correction, measured = self._correct(before, gates, statistics, held_out, name)
            else:
                measured = self._measure(held_out)
        self.statistics = {other: statistics[other] for other in bank.names}
        return Change(action, name, self.names, "solved", not correction, correction, collected, measured, time.perf_counter() - began)

    def _measure(self, held_out: HeldOut) -> dict[str, float]:
        return measure_gates(self.model, held_out, progress=self._progress) if any(held_out.rows) else {}

    def _correct(
        self, before: _Before, gates: Mapping[str, Tensor], statistics: Mapping[str, GateStatistics], held_out: HeldOut, changed: str
    ) -> tuple[float, dict[str, float]]:
        """Add the share of the correction from gradient training or routed rows that is best on held-out rows. Returns the share and the measurements."""
        old = [name for name in before.bank.names if name in self.names and name != changed]
        if not any(held_out.rows) or any(name not in statistics for name in before.bank.names if name != changed) or changed in before.bank.names:
            return 0.0, self._measure(held_out)
        added = _added(before, statistics, old)
        best: tuple[float, float, dict[str, float]] | None = None
        for share in CORRECTIONS:
            self._set(corrected(gates, added, self.names, old, share))
            measured = self._measure(held_out)
            accuracy = mean_accuracy(measured, self.names)
            if best is None or accuracy > best[0]:
                best = (accuracy, share, measured)
        assert best is not None
        self._set(corrected(gates, added, self.names, old, best[1]))
        if best[1]:
            meteora_of(self.model).provenance.gates = "trained"
        return best[1], best[2]

    def _set(self, gates: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for path, layer in meteora_layers(self.model):
                layer.gate.copy_(gates[path])

    def _attach(self, before: _Before, bank: AdapterBank, gates: Mapping[str, Tensor], origin: GateOrigin) -> None:
        attach(self.model, bank, top_k=min(before.top_k, len(bank)), temperature=before.temperature, backend=before.backend, init="zeros")
        known = meteora_of(self.model).provenance
        known.gates, known.renamed, known.embedded = origin, dict(before.renamed), before.embedded
        known.frame = before.frame
        self._set(gates)
        if not before.trainable:
            set_trainable(self.model, "none")
        self.model.eval()

    def _restored(self, before: _Before) -> _Restored:
        return _Restored(self, before)


def mean_accuracy(measured: Mapping[str, float], names: Sequence[str]) -> float:
    """The gate accuracy on held-out rows as the mean over adapters, so that an adapter with long answers does not outweigh the others.

    Args:
        measured: Result of :func:`meteora_core.training.gate_metrics.measure_gates`.
        names: Names of the adapters; those without held-out rows are left out.
    """
    found = [measured[f"gate_accuracy/{name}"] for name in names if f"gate_accuracy/{name}" in measured]
    return sum(found) / max(1, len(found))


class _Restored:
    """Detaches the adapters from the model within a block; if the block fails, the model is restored."""

    def __init__(self, live: LiveBank, before: _Before) -> None:
        self.live, self.before, self.folders = live, before, dict(live.collector.folders)

    def __enter__(self) -> None:
        detach(self.live.model)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            return
        if find_meteora(self.live.model) is not None:
            detach(self.live.model)
        self.live.collector.folders = self.folders
        self.live._attach(self.before, self.before.bank, self.before.gates, self.before.origin)


def refuse_last(adapters: Sequence[AdapterInfo], name: str) -> None:
    """Raise UsageError if ``name`` is the only adapter; the base route does not count."""
    if [adapter.name for adapter in real_adapters(adapters)] == [name]:
        raise UsageError(f"{name!r} is the only adapter, and a bank needs at least one", hint="use the base model alone, or add another adapter first")


def _refuse_twin(info: AdapterInfo, others: Sequence[AdapterInfo]) -> None:
    twin = next((other.name for other in others if info.sha256 and other.sha256 == info.sha256), None)
    if twin is not None:
        raise UsageError(f"the bank already contains this adapter under the name {twin!r}", hint=f"remove it first: meteora adapters drop CHECKPOINT {twin}")


def gates_without(
    gates: Mapping[str, Tensor],
    names: Sequence[str],
    name: str,
    layers: Mapping[str, object],
    origin: GateOrigin,
    statistics: Mapping[str, GateStatistics],
    *,
    progress: Progress = SILENT,
) -> tuple[dict[str, Tensor], bool]:
    """The gates of a bank without one of its adapters, and whether they were solved again.

    Args:
        gates: Weights of each gate, (N, h), by the layer's path.
        names: Names of the N adapters.
        name: Name of the removed adapter.
        layers: Remaining layers, by path.
        origin: Origin of the gates; only gates in closed form are solved again.
        statistics: Statistics of the remaining adapters, by name; if any are missing, the gates are not solved again.
        progress: Receiver of progress reports.

    Returns:
        Weights of each remaining gate, (N - 1, h), by the layer's path; and True if they were solved again, False if the adapter's row was deleted.
    """
    rest = [other for other in names if other != name]
    complete = all(other in statistics and not statistics[other].missing(layers) for other in rest)
    if origin == "closed form" and complete:
        return dict(closed_form_gates([statistics[other] for other in rest], list(layers), progress=progress)), True
    indices = [index for index, other in enumerate(names) if other != name]
    return {path: gates[path][indices].contiguous() for path in layers}, False


def _added(before: _Before, statistics: Mapping[str, GateStatistics], old: Sequence[str]) -> dict[str, Tensor]:
    """The correction from gradient training for the old adapters: the trained gates minus the closed form from their statistics."""
    solved = dict(closed_form_gates([statistics[name] for name in old], list(before.bank.modules)))
    return {path: before.gates[path].float() - solved[path] for path in solved}


def corrected(gates: Mapping[str, Tensor], added: Mapping[str, Tensor], names: Sequence[str], old: Sequence[str], share: float) -> dict[str, Tensor]:
    """Gates in closed form plus a share of the correction that gradient training had added for the old adapters.

    Args:
        gates: Gates in closed form, float32 (N, h), by the layer's path.
        added: Corrections for the old adapters, float32 (old adapters, h), by the layer's path.
        names: Names of the N adapters.
        old: Names of the old adapters, in the order of the rows of ``added``.
        share: Share of the corrections to add, between 0 and 1.

    Returns:
        The corrected gates, float32 (N, h), by the layer's path.
    """
    indices = [names.index(name) for name in old]
    result = {}
    for path, gate in gates.items():
        result[path] = gate.clone()
        if path in added and share:
            result[path][indices] += share * added[path]
    return result


def _state_bank(model: nn.Module) -> AdapterBank:
    state = meteora_of(model)
    return AdapterBank(state.adapters, {path: layer.stack for path, layer in meteora_layers(model)})


def _before(model: PreTrainedModel) -> _Before:
    unfuse(model)
    state = meteora_of(model)
    gates = {path: layer.gate.detach().clone() for path, layer in meteora_layers(model)}
    trainable = any(layer.gate.requires_grad for _, layer in meteora_layers(model))
    bank, origin = _state_bank(model), gate_origin(model)
    known = state.provenance
    return _Before(bank, gates, origin, state.top_k, state.temperature, state.backend, dict(known.renamed), known.embedded, trainable, known.frame)
