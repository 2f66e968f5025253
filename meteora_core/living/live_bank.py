"""Adapters join and leave a loaded model, whose gates are solved again from the statistics of all adapters that are then there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.joining import with_adapter, without_adapter
from meteora_core.adapters.stack import Stack
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
"""Shares of what gradient training had added to the closed form that are tried when trained gates are solved again."""


@dataclass(frozen=True)
class Change:
    """What a change did.

    Attributes:
        action: "add", "drop" or "update".
        adapter: The adapter's name.
        adapters: The names of all adapters that are there now, in order.
        gates: How the gates came to be: "solved" from the statistics of all adapters, or the row was "deleted" from gates that otherwise stay.
        exact: Whether they are those of one joint closed form over the present adapters.
        correction: Share of what gradient training had added that was kept; None where the gates had not been trained.
        collected: The adapters whose statistics were collected for this.
        held_out: Routing on held-out rows, as :func:`meteora_core.training.gate_metrics.measure_gates` gives it; empty where no rows are at hand.
        seconds: Duration.
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
    """The bank of a loaded model, to which adapters can be added and from which they can be dropped.

    The model is changed in place and gets a new ``model.meteora``; a fused model is unfused. A change that fails leaves it as it was.

    Args:
        model: A model with adapters attached.
        collector: Collects the statistics that are missing.
        statistics: The statistics that are there, by adapter.

    Attributes:
        statistics: The statistics of the present adapters that have some.
    """

    def __init__(self, model: PreTrainedModel, collector: Collector, statistics: Mapping[str, GateStatistics]) -> None:
        self.model, self.collector, self.statistics = model, collector, dict(statistics)
        self._progress = collector.progress

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return meteora_of(self.model).names

    def add(self, name: str, folder: str | Path) -> Change:
        """Add an adapter at the end of the bank.

        Args:
            name: Its name.
            folder: Its PEFT folder. Statistics in it (``gate_stats.safetensors``) are used; else its rows are needed.

        Raises:
            UsageError: The name is taken or not a name, or the bank holds this adapter under another name.
            AdapterError: The adapter cannot be used or does not fit the model.
            DataError: Its rows are broken, or in another prompt frame than those of the others.
            MeteoraError: An adapter has neither statistics nor rows.
        """
        if name in self.names:
            raise UsageError(f"the bank holds an adapter named {name!r} already", hint="use `meteora adapters update`, or give another --name")
        return self._join("add", name, Path(folder), None)

    def update(self, name: str, folder: str | Path) -> Change:
        """Replace an adapter by another version of it, at the same place. Arguments and errors are those of :meth:`add`."""
        place = _state_bank(self.model).index(name)
        return self._join("update", name, Path(folder), place)

    def drop(self, name: str) -> Change:
        """Take an adapter out.

        Gates in closed form are solved again from the statistics of the others, so that they are those of a bank that never had the adapter. From trained
        gates, and where statistics are missing, its rows are deleted, and the others stay as they are.

        Raises:
            UsageError: There is no such adapter, or it is the only one.
        """
        began, before = time.perf_counter(), _before(self.model)
        bank = before.bank
        bank.index(name)
        refuse_last(bank.names, name)
        rest = without_adapter(bank, name)
        statistics = {other: self.statistics[other] for other in rest.names if other in self.statistics}
        gates, exact = gates_without(before.gates, bank.names, name, rest.modules, before.origin, statistics, progress=self._progress)
        with self._restored(before):
            self._attach(before, rest, gates, before.origin)
        self.statistics = statistics
        self.collector.forget(name)
        how = "solved" if exact else "deleted"
        return Change("drop", name, self.names, how, exact, seconds=time.perf_counter() - began)

    def _join(self, action: str, name: str, folder: Path, place: int | None) -> Change:
        began, before = time.perf_counter(), _before(self.model)
        check_name(name, "adapter")
        new = AdapterBank.from_peft({name: folder}, progress=self._progress)
        others = before.bank if place is None else without_adapter(before.bank, name)
        _refuse_twin(new.adapters[0], others.adapters)
        previous = {other: each for other, each in self.statistics.items() if other in before.bank.names}
        with self._restored(before):
            new, renamed = fit_to_base(new, self.model)
            self.collector.forget(name)
            self.collector.folders[name] = folder
            new = self.collector.with_frame(new)
            bank = with_adapter(others, new, place)
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
        """Keep what gradient training had added to the closed form, as far as it serves the held-out rows; return its share and the measurement."""
        old = [name for name in before.bank.names if name in self.names and name != changed]
        if not any(held_out.rows) or any(name not in statistics for name in before.bank.names if name != changed) or changed in before.bank.names:
            return 0.0, self._measure(held_out)
        added = _added(before, statistics, old)
        best: tuple[float, float, dict[str, float]] | None = None
        for share in CORRECTIONS:
            self._set(corrected(gates, added, self.names, old, share))
            measured = self._measure(held_out)
            if best is None or measured["gate_accuracy"] > best[0]:
                best = (measured["gate_accuracy"], share, measured)
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


class _Restored:
    """Takes the adapters out of the model for the length of a block; where the block fails, the model is as it was."""

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


def refuse_last(names: Sequence[str], name: str) -> None:
    """Raise UsageError where ``name`` is the only adapter."""
    if len(names) == 1:
        raise UsageError(f"{name!r} is the only adapter, and a bank needs one", hint="use the base model alone, or add another adapter first")


def _refuse_twin(info: AdapterInfo, others: Sequence[AdapterInfo]) -> None:
    twin = next((other.name for other in others if info.sha256 and other.sha256 == info.sha256), None)
    if twin is not None:
        raise UsageError(f"the bank holds this adapter already, under the name {twin!r}", hint=f"drop that first: meteora adapters drop CHECKPOINT {twin}")


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
        gates: Layer -> (N, h).
        names: The adapters.
        name: The one that leaves.
        layers: The layers that remain.
        origin: Origin of the gates; only those in closed form are solved again.
        statistics: Of the adapters that remain, as far as they have some.
        progress: Where progress is reported.
    """
    rest = [other for other in names if other != name]
    complete = all(other in statistics and not statistics[other].missing(layers) for other in rest)
    if origin == "closed form" and complete:
        return dict(closed_form_gates([statistics[other] for other in rest], list(layers), progress=progress)), True
    kept = [place for place, other in enumerate(names) if other != name]
    return {path: gates[path][kept].contiguous() for path in layers}, False


def _added(before: _Before, statistics: Mapping[str, GateStatistics], old: Sequence[str]) -> dict[str, Tensor]:
    """What gradient training added to the gates of the old adapters: trained gates less the closed form from their statistics."""
    solved = dict(closed_form_gates([statistics[name] for name in old], list(before.bank.modules)))
    return {path: before.gates[path].float() - solved[path] for path in solved}


def corrected(gates: Mapping[str, Tensor], added: Mapping[str, Tensor], names: Sequence[str], old: Sequence[str], share: float) -> dict[str, Tensor]:
    """Gates in closed form plus a share of what training had added to the rows of the old adapters.

    Args:
        gates: Layer -> float32 (N, h).
        added: Layer -> float32 (n, h), for the old adapters.
        names: The N adapters.
        old: The n old ones, in the order of ``added``.
        share: Between 0 and 1.
    """
    places = [names.index(name) for name in old]
    made = {}
    for path, gate in gates.items():
        made[path] = gate.clone()
        if path in added and share:
            made[path][places] += share * added[path]
    return made


def _state_bank(model: nn.Module) -> AdapterBank:
    state = meteora_of(model)
    modules = {
        path: Stack(layer.lora_A.detach(), layer.lora_B.detach(), tuple(layer.ranks), layer.scaling.detach().cpu()) for path, layer in meteora_layers(model)
    }
    return AdapterBank(state.adapters, modules)


def _before(model: PreTrainedModel) -> _Before:
    unfuse(model)
    state = meteora_of(model)
    gates = {path: layer.gate.detach().clone() for path, layer in meteora_layers(model)}
    trainable = any(layer.gate.requires_grad for _, layer in meteora_layers(model))
    bank, origin = _state_bank(model), gate_origin(model)
    known = state.provenance
    return _Before(bank, gates, origin, state.top_k, state.temperature, state.backend, dict(known.renamed), known.embedded, trainable, known.frame)
