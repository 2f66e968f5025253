"""The routing state that all layers of an attached model share, and functions that find it or record its routes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.ranges import check_temperature
from meteora_core.routing.base_record import BaseRecord
from meteora_core.routing.constants import Constants
from meteora_core.routing.mode import GateLabels, GateObservations, LastCall, Mode
from meteora_core.routing.options import RoutingOptions, RowRoutes
from meteora_core.routing.provenance import GateOrigin, Provenance
from meteora_core.routing.routes import Recorder, Routes
from meteora_kernels import BACKENDS, Routing

if TYPE_CHECKING:
    from meteora_core.adapters.peft_folder import AdapterInfo

_log = logging.getLogger(__name__)


class Meteora:
    """The routing state of a model with adapters: ``model.meteora``, which ``attach`` sets and all layers of the model share.

    It has three parts: how tokens choose adapters (:attr:`routing`, :attr:`backend`), what a call of the layers does in addition or instead
    (:attr:`mode`, set by the ``with`` blocks :meth:`force`, :meth:`mix`, :meth:`apply`, :meth:`apply_rows`, :meth:`label_gates`, :meth:`record` and
    :meth:`disabled`), and the origin of the model (:attr:`provenance`).

    Args:
        adapters: The bank's adapters, in order.
        top_k: Number of adapters per token in each layer, between 1 and N.
        temperature: Routing temperature T, from 1.18e-38 to 8.5e+37; divides the chosen gate logits before the softmax.
        backend: Implementation of the sum over adapters, a name of ``meteora_kernels.BACKENDS``.

    Attributes:
        provenance: The base model and the origin of the gates.
        last_call: Shape of the last batch that the model was called with; it is only kept while layers are observed.
        version: Counter that increases with every change of :attr:`routing`, :attr:`backend` and :attr:`mode`.

    Raises:
        UsageError: top_k or temperature is out of range, or the backend is unknown.

    Example:
        >>> model.meteora.top_k = 1  # doctest: +SKIP
        >>> with model.meteora.force("gsm8k"):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    def __init__(self, adapters: tuple[AdapterInfo, ...], top_k: int, temperature: float, backend: str) -> None:
        self.adapters = adapters
        self.provenance = Provenance()
        self.last_call = LastCall()
        self.version = 0
        self._constants = Constants()
        self._routing = Routing()
        self._mode = Mode()
        self.top_k = top_k
        self.temperature = temperature
        self.backend = backend

    # --- how tokens choose -----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, by index."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def routing(self) -> Routing:
        """How tokens choose adapters: top-k, routing temperature and the adapters that are allowed. Assign an earlier value to restore it."""
        return self._routing

    @routing.setter
    def routing(self, value: Routing) -> None:
        self._routing = value
        self.version += 1

    @property
    def top_k(self) -> int:
        """The number of adapters per token in each layer. Setting it to a value outside 1..N raises UsageError."""
        return self._routing.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if not 1 <= value <= len(self.adapters):
            raise UsageError(f"top_k is {value}, but the bank has {len(self.adapters)} adapters", hint=f"choose --top-k between 1 and {len(self.adapters)}")
        self.routing = self._routing._replace(top_k=int(value))

    @property
    def temperature(self) -> float:
        """The routing temperature T of the softmax over the chosen adapters, from 1.18e-38 to 8.5e+37; other values raise UsageError."""
        return self._routing.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.routing = self._routing._replace(temperature=float(check_temperature(value)))

    @property
    def backend(self) -> str:
        """The implementation of the sum over adapters. Setting an unknown name raises UsageError."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in BACKENDS:
            raise UsageError(f"unknown backend {value!r}", hint=f"choose from: {', '.join(BACKENDS)}")
        self._backend = value
        self.version += 1

    def mute(self, names: Iterable[str]) -> None:
        """Exclude adapters from routing; every call replaces the list of the call before, and an empty list allows all adapters again.

        Args:
            names: Names of the adapters that are never chosen.

        Raises:
            UsageError: A name is unknown, or no adapter would be left.
        """
        muted = frozenset(names)
        if unknown := muted - set(self.names):
            raise UsageError(f"no adapter named {sorted(unknown)[0]!r}", hint=f"there are: {', '.join(self.names)}")
        if len(muted) == len(self.names):
            raise UsageError("all adapters would be muted", hint="leave at least one")
        indices = frozenset(self.names.index(name) for name in muted)
        self.routing = self._routing._replace(allowed=self._constants.all_but(indices, len(self.names)) if muted else None)

    @property
    def muted(self) -> frozenset[str]:
        """Names of the adapters that are excluded from routing."""
        allowed = self._routing.allowed
        return frozenset() if allowed is None else frozenset(name for name, fine in zip(self.names, allowed.tolist(), strict=True) if not fine)

    def choose(self, names: Sequence[str]) -> None:
        """Restrict routing to some adapters until the next call: a single one is forced, and among several the gates choose.

        Args:
            names: Known names, at least one. All names give the gates their free choice.
        """
        forced = self._constants.single(self.names.index(names[0])) if len(set(names)) == 1 and len(self.names) > 1 else None
        self.mute([] if forced is not None else [name for name in self.names if name not in names])
        self.last_call = LastCall()
        self.mode = replace(self.mode, enabled=True, forced=forced, rows=None)

    def routing_on(self, device: torch.device) -> Routing:
        """:attr:`routing` with its tensors on a layer's device."""
        routing = self._routing
        if routing.allowed is None:
            return routing
        return Routing(routing.top_k, routing.temperature, self.on(routing.allowed, device))

    def group_routing(self, device: torch.device, *, output: bool) -> Routing:
        """How a fused group routes its tokens in the current mode, with tensors on a device; ``output``: it computes the model's logits."""
        rows = self._mode.rows
        if rows is None:
            return self.routing_on(device)
        if output and rows.output is not None:
            rows = rows.output
        assert rows.grouped is not None
        allowed = rows.grouped.allowed
        return rows.grouped if allowed is None else rows.grouped._replace(allowed=self.on(allowed, device))

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of :attr:`routing` or :attr:`mode` on a layer's device (:class:`~meteora_core.routing.constants.Constants`)."""
        return self._constants.on(tensor, device)

    # --- what layers do in addition ----------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """What a call of the layers does in addition to routing, or instead of it."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._mode = value
        self.version += 1

    @property
    def observed(self) -> bool:
        """Whether layers must do more than compute their output: routes are forced, labelled or recorded."""
        return self._mode.observed

    @contextmanager
    def label_gates(self, labels: Tensor, *, keep_hits: bool = False, alone: bool = False) -> Iterator[GateObservations]:
        """Compute the gate loss in all forward calls within the block.

        With gradient checkpointing, ``backward`` must also be called within the block: layers run again there and need the same labels.

        Args:
            labels: Index of the adapter that each token should choose, int64 (batch, tokens); -100 is ignored.
            keep_hits: Whether to keep, for each layer, at which tokens the first choice equals the label.
            alone: Whether the gate loss has gradients only for the gate of its layer, and none for the modules that computed the layer's input.

        Yields:
            The gate losses, and the hits if they are kept, filled in by the forward calls.
        """
        observations = GateObservations()
        self.last_call = LastCall()
        self.mode = replace(self.mode, gate_labels=GateLabels(labels, observations, keep_hits, alone))
        try:
            yield observations
        finally:
            self.mode = replace(self.mode, gate_labels=None)

    @contextmanager
    def force(self, adapters: Tensor | int | str | None) -> Iterator[None]:
        """Bypass the gates within the block.

        Args:
            adapters: One adapter for all tokens, by name or index; or indices, int64, one per row (batch,) or one per token (batch, tokens). None
                lets the gates choose.

        Raises:
            UsageError: There is no adapter of this name.
        """
        if isinstance(adapters, str):
            if adapters not in self.names:
                raise UsageError(f"no adapter named {adapters!r}", hint=f"there are: {', '.join(self.names)}")
            adapters = self.names.index(adapters)
        forced = self._constants.single(adapters) if isinstance(adapters, int) else adapters
        self.last_call = LastCall()
        before, self.mode = self.mode.forced, replace(self.mode, forced=forced)
        try:
            yield
        finally:
            self.mode = replace(self.mode, forced=before)

    def mix(self, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        """Replace the gates within the block by a static mix: ``y = W x + sum_i w_i s_i B_i A_i x`` for every token and layer.

        PEFT's ``add_weighted_adapter(..., combination_type="cat")`` computes the same. Its "linear" does not: it multiplies sums of matrices, so that A of
        one adapter also meets B of another; the two agree only if one adapter has a weight.

        Args:
            weights: Weight of each adapter by name; they need not sum to 1.

        Raises:
            UsageError: A name is unknown or a weight is not finite.

        Example:
            >>> with model.meteora.mix({"gsm8k": 0.7, "strategyqa": 0.3}):  # doctest: +SKIP
            ...     model.generate(**inputs)
        """
        return self.apply(RoutingOptions(weights=weights))

    @contextmanager
    def apply(self, options: RoutingOptions) -> Iterator[None]:
        """Route all tokens by ``options`` within the block. Raises UsageError if the options do not fit the adapters.

        Example:
            >>> with model.meteora.apply(RoutingOptions(top_k=1, muted={"gsm8k"})):  # doctest: +SKIP
            ...     model.generate(**inputs)
        """
        options.check(self.names)
        rows = None if options.weights is None or not options.enabled else self._row_routes((options,))
        forced = options.forced if options.enabled else None
        routing, mode = self._routing, self._mode
        self.last_call = LastCall()
        try:
            if options.top_k is not None:
                self.top_k = options.top_k
            if options.temperature is not None:
                self.temperature = options.temperature
            if options.muted:
                self.mute({*options.muted, *self.muted})
            self.mode = replace(mode, enabled=options.enabled, rows=rows, forced=None if forced is None else self._constants.single(self.names.index(forced)))
            yield
        finally:
            self.routing = routing
            self.mode = replace(self.mode, enabled=mode.enabled, rows=mode.rows, forced=mode.forced)

    @contextmanager
    def apply_rows(self, options: Sequence[RoutingOptions]) -> Iterator[None]:
        """Route each row of a batch by options of its own within the block.

        The layers compute all rows in one call. Every row has as many routes as the row that needs most; the others have weight 0, so a row's output does
        not depend on the options of other rows.

        Args:
            options: Options of each row. The model must be called with this number of rows; a single one holds for all rows.

        Raises:
            UsageError: The options do not fit the adapters, or the list is empty.

        Example:
            >>> with model.meteora.apply_rows([RoutingOptions(forced="gsm8k"), RoutingOptions(top_k=1)]):  # doctest: +SKIP
            ...     model(**batch_of_two_rows)
        """
        if not options:
            raise UsageError("there are no routing options for the rows", hint="give one RoutingOptions for each row of the batch")
        if all(row == options[0] for row in options):
            with self.apply(options[0]):
                yield
            return
        for row in options:
            row.check(self.names)
        self.last_call = LastCall()
        mode = self._mode
        self.mode = replace(mode, enabled=True, forced=None, rows=self._row_routes(tuple(options)))
        try:
            yield
        finally:
            self.mode = replace(self.mode, enabled=mode.enabled, rows=mode.rows, forced=mode.forced)

    @contextmanager
    def apply_packed(self, options: Sequence[RoutingOptions], counts: Sequence[int], outputs: Sequence[int]) -> Iterator[None]:
        """Route the tokens of several texts that are packed into one row, each text by options of its own, within the block.

        Args:
            options: Options of each text.
            counts: Number of tokens of each text, in order. The model must be called with all of them in a batch of one row.
            outputs: Positions, among all tokens, of those that logits are computed for (``logits_to_keep``).

        Raises:
            UsageError: The options do not fit the adapters.

        Example:
            >>> with model.meteora.apply_packed([RoutingOptions(forced="gsm8k"), RoutingOptions(top_k=1)], [5, 3], [4, 7]):  # doctest: +SKIP
            ...     model(input_ids, position_ids=positions, use_cache=False, logits_to_keep=torch.tensor([4, 7]))
        """
        for text in set(options):
            text.check(self.names)
        same = all(text == options[0] for text in options)
        if same and self._mode.recorder is None and options[0].forced is None:
            with self.apply(options[0]):
                yield
            return
        self.last_call = LastCall()
        mode = self._mode
        rows = self._row_routes((options[0],) if same else tuple(options))
        self.mode = replace(mode, enabled=True, forced=None, rows=rows if same else rows.packed(counts, outputs))
        try:
            yield
        finally:
            self.mode = replace(self.mode, enabled=mode.enabled, rows=mode.rows, forced=mode.forced)

    @contextmanager
    def apply_fixed(self, rows: RowRoutes) -> Iterator[None]:
        """Route the tokens of a batch by ready tensors of :class:`~meteora_core.routing.options.FixedRows` within the block."""
        self.last_call = LastCall()
        mode = self._mode
        self.mode = replace(mode, enabled=True, forced=None, rows=rows)
        try:
            yield
        finally:
            self.mode = replace(self.mode, enabled=mode.enabled, rows=mode.rows, forced=mode.forced)

    def _row_routes(self, options: tuple[RoutingOptions, ...]) -> RowRoutes:
        """The tensors of some rows' options; equal options give the same object while it is in use."""
        routing = self._routing
        key = (options, routing.top_k, routing.temperature, self.muted)
        return self._constants.rows(key, lambda: RowRoutes.of(options, self.names, routing))

    @contextmanager
    def record(self, recorder: Recorder) -> Iterator[None]:
        """Pass the choices of all layers to ``recorder`` within the block. Replays of a captured CUDA graph record nothing."""
        self.last_call = LastCall()
        before, self.mode = self.mode.recorder, replace(self.mode, recorder=recorder)
        try:
            yield
        finally:
            self.mode = replace(self.mode, recorder=before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all adapters off within the block, so that the model computes what its base model computes."""
        before, self.mode = self.mode.enabled, replace(self.mode, enabled=False)
        try:
            yield
        finally:
            self.mode = replace(self.mode, enabled=before)

    # --- the origin of the model -----------------------------------------------------------------------------------------------

    @property
    def gates(self) -> GateOrigin:
        """The origin of the gates, if it is known."""
        return self.provenance.gates

    @gates.setter
    def gates(self, value: GateOrigin) -> None:
        self.provenance.gates = value


def find_meteora(model: nn.Module) -> Meteora | None:
    """``model.meteora`` of a model with adapters attached; None for other models."""
    state = getattr(model, "meteora", None)
    return state if isinstance(state, Meteora) else None


def meteora_of(model: nn.Module) -> Meteora:
    """``model.meteora`` of a model with adapters attached. Raises UsageError when nothing is attached."""
    state = find_meteora(model)
    if state is None:
        raise UsageError("this model has no adapters attached", hint="call meteora_core.attach(model, bank) first")
    return state


def base_record(model: nn.Module) -> BaseRecord:
    """The record of a model's base model, with or without adapters attached. The record belongs to the model, so changes to it persist."""
    state = find_meteora(model)
    if state is not None:
        return state.provenance.base
    record = getattr(model, "meteora_base", None)
    if record is None:
        record = BaseRecord()
        model.meteora_base = record  # type: ignore[assignment]
    assert isinstance(record, BaseRecord)
    return record


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Record the choices of every layer for every token, within the block.

    Outside such a block, recording costs a layer one check per call. Within the block, the model runs eagerly, because a replayed graph runs no Python
    code: compiled code is not used (``torch.compile``, and the compiled or captured decoding that transformers' ``generate`` uses with a static cache).
    A warning is logged if the model is compiled. A decoder that captures and replays CUDA graphs itself must run eagerly while
    :attr:`Meteora.observed` is true.

    Args:
        model: A model with adapters attached.

    Yields:
        A :class:`Routes`, filled by the calls of the model (``forward``, or ``generate`` with or without a cache).

    Raises:
        UsageError: Nothing is attached to the model.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from meteora_core import load_checkpoint, record_routes
        >>> model, tokenizer = load_checkpoint("runs/mine"), AutoTokenizer.from_pretrained("base")
        >>> with record_routes(model) as routes:
        ...     output = model.generate(**tokenizer("Is 7 even?", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
        >>> routes.shares().shape  # 10 tokens of the prompt and the first two of the answer; the third was never an input
        torch.Size([1, 12, 2])
    """
    state = meteora_of(model)
    routes = Routes(state.names)
    if is_compiled(model):
        _log.warning("routes are recorded by eager code: the compiled or captured code of this model is not used while they are recorded")
    with state.record(routes), torch.compiler.set_stance("force_eager"):
        yield routes


def is_compiled(model: nn.Module) -> bool:
    """Whether the model is compiled by ``torch.compile``, or ``generate`` is set to a static cache, for which transformers compiles the model on a GPU."""
    compiled = any(getattr(model, name, None) is not None for name in ("_orig_mod", "_compiled_call_impl", "_compiled_call"))
    cache = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    return compiled or (isinstance(cache, str) and "static" in cache)
