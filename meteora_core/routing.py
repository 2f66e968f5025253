"""The state that all layers of one attached model share, and a record of what they chose.

:class:`RoutingState` is what `attach` puts on a model as ``model.meteora``: how many adapters a token gets, at which temperature, by
which backend, and, for the length of a ``with`` block, forced routes, gate labels for training, or a recorder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from meteora_core.errors import UsageError

if TYPE_CHECKING:
    from meteora_core.adapters.peft_folder import AdapterInfo
    from meteora_core.model.base_marks import Marks

_log = logging.getLogger(__name__)

GateOrigin = Literal["untrained", "closed form", "trained"]
"""How the gates of a model came to be: at their random or zero start, computed without gradients (Arrow, ridge regression), or trained."""

IGNORE = -100
"""The label of a position that no loss counts (as in PyTorch and transformers)."""


@dataclass(frozen=True)
class RoutingDecision:
    """What one layer chose for a batch of tokens.

    Attributes:
        indices: int64 (batch, tokens, k), adapters in falling order of their logits.
        weights: float32 (batch, tokens, k), summing to 1 over k.

    Raises:
        ValueError: The shapes differ or are not three-dimensional.
    """

    indices: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 3 or self.indices.shape != self.weights.shape:
            raise ValueError(f"a routing decision needs equal (batch, tokens, k) shapes, got {tuple(self.indices.shape)} and {tuple(self.weights.shape)}")


@dataclass
class Routes:
    """What every layer chose while :func:`record_routes` was on, in the order of the forward calls.

    An output layer (``lm_head``) with adapters is recorded apart, since it may see only the last token of every row: :meth:`steps` has what it chose,
    :attr:`paths`, :meth:`packed` and :meth:`shares` leave it out.

    Attributes:
        names: The adapters' names, by index.
    """

    names: tuple[str, ...]
    _steps: dict[str, list[RoutingDecision]] = field(default_factory=dict)
    _outputs: dict[str, list[RoutingDecision]] = field(default_factory=dict)

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Append the choice of layer ``path`` for one forward call; shapes (batch, tokens, k) or (tokens, k).

        Raises:
            UsageError: A CUDA graph is being captured: its replays would never come here.
        """
        self._steps.setdefault(path, []).append(_decision(indices, weights))

    def add_output(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """The same for a layer that makes logits; see the class."""
        self._outputs.setdefault(path, []).append(_decision(indices, weights))

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers that were recorded, in the order of their first call."""
        return tuple(self._steps)

    def steps(self, path: str) -> list[RoutingDecision]:
        """The decisions of one layer, one per forward call."""
        return self._steps[path] if path in self._steps else self._outputs[path]

    def layer(self, path: str) -> RoutingDecision:
        """All calls of one layer joined along the tokens, on the CPU.

        With ``generate`` and a cache, position ``t`` is token ``t`` of the padded prompt and answer.

        Raises:
            ValueError: The batch size changed between calls.
        """
        steps = self.steps(path)
        if len({step.indices.shape[0] for step in steps}) > 1:
            raise ValueError(f"{path}: the batch size changed while routes were recorded; use steps() instead")
        return RoutingDecision(torch.cat([step.indices.cpu() for step in steps], 1), torch.cat([step.weights.cpu() for step in steps], 1))

    def packed(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """All decisions for one row of the batch: indices int64 and weights float32, both (tokens, layers, k), on the CPU.

        The layers stand in the order of :attr:`paths`. A later forward call with another k (forced routes have 1) is padded with weight 0.

        Raises:
            ValueError: The layers did not see the same tokens.
        """
        calls = {len(steps) for steps in self._steps.values()}
        if len(calls) > 1:
            raise ValueError("the layers were called differently often while routes were recorded; use steps() instead")
        if not calls or calls == {0}:
            empty = torch.zeros(0, len(self._steps), 1)
            return empty.long(), empty
        indices, weights = [], []
        for call in zip(*self._steps.values(), strict=True):
            place = call[0].indices.device  # the layers of a model may be spread over several
            indices.append(torch.stack([decision.indices.to(place) for decision in call], 2)[row].cpu())
            weights.append(torch.stack([decision.weights.to(place) for decision in call], 2)[row].cpu())
        width = max(part.shape[-1] for part in indices)
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in (*indices, *weights)]
        return torch.cat(padded[: len(indices)]), torch.cat(padded[len(indices) :])

    def clear(self) -> None:
        """Forget what was recorded so far; the layers' order is kept."""
        for steps in (*self._steps.values(), *self._outputs.values()):
            steps.clear()

    def shares(self, paths: Iterable[str] | None = None) -> Tensor:
        """Mean weight of every adapter per token, over layers: float32 (batch, tokens, N); rows sum to 1.

        Args:
            paths: The layers to average over; None means all that were recorded.
        """
        paths = tuple(self._steps if paths is None else paths)
        total: Tensor | None = None
        for path in paths:
            decision = self.layer(path)
            dense = torch.zeros(*decision.indices.shape[:2], len(self.names)).scatter_add_(-1, decision.indices, decision.weights)
            total = dense if total is None else total + dense
        if total is None:
            return torch.zeros(0, 0, len(self.names))
        return total / len(paths)


def _decision(indices: Tensor, weights: Tensor) -> RoutingDecision:
    if indices.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError("routes cannot be recorded while a CUDA graph is captured", hint="leave record_routes before the capture")
    indices, weights = indices.detach(), weights.detach().float()
    return RoutingDecision(indices[None], weights[None]) if indices.ndim == 2 else RoutingDecision(indices, weights)


@dataclass
class LastCall:
    """The batch that the model was called with last, while layers are observed.

    Attributes:
        shape: (batch, tokens); None when it is not known.
        scattered: Logits are wanted at positions that a tensor names, so that an output layer cannot tell which tokens it sees.
    """

    shape: torch.Size | None = None
    scattered: bool = False


@dataclass
class GateObservations:
    """What the layers hand out while gate labels are set: one entry per layer call.

    Attributes:
        loss_sums: Per layer, the sum over labelled positions of CE(gate logits, label); float32 scalars with gradients.
        hits: Per layer path, bool (positions,) whether the top-1 adapter is the label (at ignored positions it is meaningless).
        weights: Set by whoever labels the gates, before the forward pass: what each position weighs in the sums, float32 (positions,); None is 1.
    """

    loss_sums: list[Tensor] = field(default_factory=list)
    hits: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    def mean_loss(self, positions: Tensor | int) -> Tensor:
        """CE_gate: the mean over layers and over ``positions`` labelled positions; a float32 scalar with gradients."""
        return torch.stack(self.loss_sums).sum() / (len(self.loss_sums) * positions)


class RoutingState:
    """Shared by all MeteoRA layers of one model.

    Args:
        adapters: The bank's adapters, in order.
        top_k: Adapters per token.
        temperature: T > 0.
        backend: A name of ``meteora_kernels.BACKENDS``.

    Attributes:
        version: Grows with every change of anything here.
        gates: How the gates came to be, as far as it is known; "untrained" is checked against the weights before it is believed
            (:func:`meteora_core.model.attach.gate_origin`).

    Raises:
        UsageError: top_k or temperature is out of range, or the backend is unknown.
    """

    def __init__(self, adapters: tuple[AdapterInfo, ...], top_k: int, temperature: float, backend: str) -> None:
        self.version = 0
        self.adapters = adapters
        self.base_probe: list[float] | None = None
        self.base_marks: Marks | None = None  # the base's weights when the adapters were attached
        self.gates: GateOrigin = "trained"
        self.start: tuple[str, int, tuple[str, ...]] | None = None  # how `attach` started the gates: init, seed, and the layers in order
        self.renamed: dict[str, str] = {}  # modules that the adapters' folders call otherwise: their name there -> here
        self.embedded = False  # the adapters are not those of their folders: a checkpoint has to hold them
        self.enabled = True
        self.allowed: Tensor | None = None
        self.forced: Tensor | None = None
        self.gate_labels: Tensor | None = None
        self.observations: GateObservations | None = None
        self.keep_hits = False
        self.gates_alone = False
        self.recorder: Routes | None = None
        self.last_call = LastCall()
        self._masks: dict[frozenset[str], Tensor] = {}
        self._singles: dict[int, Tensor] = {}
        self._copies: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()
        self.top_k = top_k
        self.temperature = temperature
        self.backend = backend

    def __getstate__(self) -> dict[str, object]:
        """All but what is remembered for speed, which can be neither pickled nor of use elsewhere."""
        return {name: value for name, value in vars(self).items() if name != "_copies"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _copies=WeakTensorKeyDictionary())

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "version":
            self.version += 1

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, by index."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def top_k(self) -> int:
        """Adapters per token; setting it out of 1..N raises UsageError."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if not 1 <= value <= len(self.adapters):
            raise UsageError(f"top_k is {value}, but the bank has {len(self.adapters)} adapters", hint=f"choose --top-k between 1 and {len(self.adapters)}")
        self._top_k = int(value)

    @property
    def temperature(self) -> float:
        """Softmax temperature over the chosen adapters; setting it to 0 or less raises UsageError."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0 or value == float("inf"):
            raise UsageError(f"the routing temperature T is {value}, it must be above 0 and finite", hint="T = 1 is the default; composites use 15 to 30")
        self._temperature = float(value)

    @property
    def backend(self) -> str:
        """Which implementation runs; setting an unknown name raises UsageError."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        from meteora_kernels import BACKENDS

        if value not in BACKENDS:
            raise UsageError(f"unknown backend {value!r}", hint=f"choose from: {', '.join(BACKENDS)}")
        self._backend = value

    @property
    def observed(self) -> bool:
        """Whether layers must do more than compute their output."""
        return self.gate_labels is not None or self.recorder is not None or self.forced is not None

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """:attr:`allowed` or :attr:`forced` on a layer's device: copied once, not by every layer (a captured CUDA graph cannot copy from the host)."""
        if tensor.device == device or torch.compiler.is_compiling():
            return tensor.to(device)
        copies = self._copies.setdefault(tensor, {})
        if device not in copies:
            with torch.inference_mode(False):
                copies[device] = tensor.to(device)
        return copies[device]

    @contextmanager
    def label_gates(self, labels: Tensor, *, keep_hits: bool = False, alone: bool = False) -> Iterator[GateObservations]:
        """Within the block, forward calls also compute the gate loss.

        The block must also hold ``backward`` when gradient checkpointing is on: layers run again there and must see the same labels.

        Args:
            labels: int64 (batch, tokens), the adapter that each position should choose; -100 is ignored.
            keep_hits: Also keep, per layer, where the top-1 adapter is the label.
            alone: The gate loss has gradients for each layer's own gate alone, none for what computed its input.
        """
        observations = GateObservations()
        self.last_call = LastCall()
        self.gate_labels, self.observations, self.keep_hits, self.gates_alone = labels, observations, keep_hits, alone
        try:
            yield observations
        finally:
            self.gate_labels, self.observations, self.keep_hits, self.gates_alone = None, None, False, False

    @contextmanager
    def force(self, adapters: Tensor | int | str | None) -> Iterator[None]:
        """Within the block, bypass the gates: one adapter for all, per row (batch,), or per token (batch, tokens)."""
        if isinstance(adapters, str):
            if adapters not in self.names:
                raise UsageError(f"no adapter named {adapters!r}", hint=f"there are: {', '.join(self.names)}")
            adapters = self.names.index(adapters)
        if isinstance(adapters, int):
            if adapters not in self._singles:
                with torch.inference_mode(False):
                    self._singles[adapters] = torch.tensor([adapters])
            adapters = self._singles[adapters]
        self.last_call = LastCall()
        before, self.forced = self.forced, adapters
        try:
            yield
        finally:
            self.forced = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, the model is its base."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def mute(self, names: Iterable[str]) -> None:
        """Never choose these adapters (an empty list lifts it). Raises UsageError for an unknown name or when none would be left."""
        muted = frozenset(names)
        if unknown := muted - set(self.names):
            raise UsageError(f"no adapter named {sorted(unknown)[0]!r}", hint=f"there are: {', '.join(self.names)}")
        if len(muted) == len(self.names):
            raise UsageError("all adapters would be muted", hint="leave at least one")
        if muted and muted not in self._masks:
            with torch.inference_mode(False):
                self._masks[muted] = torch.tensor([name not in muted for name in self.names])
        self.allowed = self._masks[muted] if muted else None


def routing_state(model: nn.Module) -> RoutingState:
    """The state of an attached model. Raises UsageError when nothing is attached."""
    state = getattr(model, "meteora", None)
    if not isinstance(state, RoutingState):
        raise UsageError("this model has no adapters attached", hint="call meteora_core.attach(model, bank) first")
    return state


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Record what every layer chooses for every token, within the block.

    When nothing is recorded, a layer pays one check a call. Within the block compiled code (``torch.compile``, and the compiled or
    graph-captured decoding that transformers' ``generate`` uses with a static cache) is left for eager code, since a replayed graph runs no
    Python; a note is logged if the model is compiled. A decoder that replays CUDA graphs of its own must run eagerly while
    :attr:`RoutingState.observed` is true.

    Args:
        model: A model with adapters attached.

    Yields:
        A :class:`Routes` that fills as the model runs (forward, or ``generate`` with or without a cache).

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
    state = routing_state(model)
    routes, before = Routes(state.names), state.recorder
    if is_compiled(model):
        _log.warning("routes are recorded by eager code: the compiled or captured code of this model is not used meanwhile")
    state.recorder, state.last_call = routes, LastCall()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield routes
    finally:
        state.recorder = before


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs ``torch.compile``'s code, or ``generate`` is set to a static cache, for which it compiles on a GPU."""
    compiled = any(getattr(model, name, None) is not None for name in ("_orig_mod", "_compiled_call_impl", "_compiled_call"))
    cache = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    return compiled or (isinstance(cache, str) and "static" in cache)
