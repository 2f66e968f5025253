"""Steps in which every request reads one token, with shapes that do not depend on the requests.

On a CUDA GPU, such a step is a CUDA graph, because launching a step in eager mode takes longer than running it. There is one graph for each padded number of
requests, number of columns and kind of routing. A graph ends with the most likely tokens, which the next step reads, so the host can launch a step before it
has read the tokens of the previous one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.generation.capture import CapturedStep, capture
from meteora_core.generation.nonfinite import not_finite
from meteora_core.routing import FixedRows, RoutingOptions, RowRoutes, find_meteora
from meteora_core.serving.choosing import Chooser, choose_free
from meteora_core.serving.packed import FixedPass, forward
from meteora_core.serving.recording import LastRoutes, StepRoutes
from meteora_core.serving.slots import FIRST_CAPACITY, Slots
from meteora_core.serving.transfers import to_device, to_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

ALONE = 4
"""Number of routing options that have graphs of their own while all requests of a batch have them; other batches share graphs in which rows differ."""


@dataclass(eq=False)
class Ran:
    """A step that was launched. Call :meth:`wait` before you read its tensors.

    Attributes:
        count: Number of requests.
        tokens: Most likely or drawn token of each request, int64 (requests,), on the CPU.
        broken: Whether the logits of a request are NaN or infinite, bool (requests,), on the CPU.
        logits: Logits float32 (requests, vocabulary) on the device; valid until the next launch.
        routes: The adapters of each request, on the CPU; None if they were not recorded.
    """

    count: int
    tokens: Tensor
    broken: Tensor
    logits: Tensor
    routes: StepRoutes | None
    _event: Any = None

    def wait(self) -> None:
        """Wait until the step has run."""
        if self._event is not None:
            self._event.synchronize()


@dataclass(eq=False)
class _Step:
    """A step of one shape."""

    run: Callable[[], Tensor]
    routes: StepRoutes | None = None
    captured: CapturedStep | None = None
    keep: list[Any] = field(default_factory=list)


class FixedSteps:
    """Runs steps of fixed shapes over the first slots.

    Args:
        model: A model that :func:`meteora_core.serving.packed.packed_attention` prepares.
        slots: Keys and values of the requests.

    Attributes:
        graphs: Whether steps are replayed as CUDA graphs: on a CUDA GPU, until a capture fails.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots) -> None:
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self.graphs = self.device.type == "cuda"
        with torch.inference_mode():
            self._token = torch.zeros(slots.count, dtype=torch.int64, device=self.device)
            self._positions = torch.zeros(slots.count, dtype=torch.int64, device=self.device)
        self._steps: dict[Hashable, _Step] = {}
        self._rows: dict[tuple[int, bool], FixedRows] = {}
        self._alone: list[RoutingOptions] = []
        self._memory: Any = None
        self._allocated = -1

    def clear(self) -> None:
        """Forget all graphs, because the model or its adapters have changed."""
        self._steps.clear()
        self._rows.clear()
        self._alone.clear()
        self._memory = None

    def launch(self, texts: Sequence[tuple[int, int]] | None, end: int, options: Sequence[RoutingOptions], choosers: Sequence[Chooser], record: str) -> Ran:
        """Read one token of each request and choose the next.

        Args:
            texts: Token and position of each request; None means the tokens that the last launch chose.
            end: Number of columns in use after this step.
            options: Routing options of each request.
            choosers: Choosers of the requests. Those that are not free do not draw here.
            record: Routes to record: "none", "mean" or "layers".
        """
        count = len(options)
        batch = min(1 << (count - 1).bit_length(), self.slots.count)
        width = min(max(FIRST_CAPACITY, 1 << (end - 1).bit_length()), self.slots.capacity)
        if self._allocated != self.slots.allocation:
            self._allocated = self.slots.allocation
            self.clear()
        if texts is not None:
            given = to_device(torch.tensor([*texts, *[(0, 0)] * (batch - count)]), self.device)
            self._token[:batch], self._positions[:batch] = given.unbind(1)
        step = self._step(batch, width, options, recorded=record != "none")
        logits = step.run() if step.captured is None else step.captured.replay()
        token = choose_free(logits, self._token[:batch], choosers)
        routes = None if step.routes is None or record == "none" else step.routes.on_host(count, layers=record == "layers")
        ran = Ran(count, to_host(token[:count]), to_host(not_finite(logits[:count])), logits[:count], routes)
        if self.device.type == "cuda":
            ran._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ran._event.record()
        return ran

    # --- the kinds of steps ----------------------------------------------------------------------------------------------------

    def _step(self, batch: int, width: int, options: Sequence[RoutingOptions], *, recorded: bool) -> _Step:
        state = find_meteora(self.model)
        alone = all(each == options[0] for each in options) and not recorded
        if state is None or (alone and self._has_own(options[0])):
            key: Hashable = (batch, width, options[0] if state is not None else None)
            if key not in self._steps:
                self._steps[key] = self._make(batch, width, options[0], None)
            return self._steps[key]
        most = min(1 << (max(each.routes(state.routing) for each in options) - 1).bit_length(), len(state.names))
        kind = most, any(each.enabled and each.weights is not None for each in options)
        if kind not in self._rows:
            self._rows[kind] = FixedRows(state.names, state.routing, self.slots.count, most, self.device, mixes=kind[1])
        self._rows[kind].set(options)
        key = (batch, width, kind)
        if key not in self._steps:
            self._steps[key] = self._make(batch, width, None, self._rows[kind])
        return self._steps[key]

    def _has_own(self, options: RoutingOptions) -> bool:
        if options not in self._alone and len(self._alone) < ALONE and options.weights is None:
            self._alone.append(options)
        return options in self._alone

    def _make(self, batch: int, width: int, options: RoutingOptions | None, rows: FixedRows | None) -> _Step:
        """Make a step, whose rows have the same ``options``, or those of ``rows``; it records routes with ``rows``. On a CUDA GPU it is captured."""
        now = FixedPass(self.slots, self._positions[:batch], width)
        token, positions = self._token[:batch], self._positions[:batch]
        state = find_meteora(self.model)
        ready = None if rows is None else rows.first(batch)
        if state is not None and options is not None and options.enabled and options.forced is not None:
            ready = RowRoutes.of((options,), state.names, state.routing)

        def run() -> Tensor:
            now.begin()
            recorder = None if rows is None else LastRoutes(range(batch), self.device, everything=True)
            with self._routed(options, ready, recorder):
                logits = forward(self.model, token.unsqueeze(0), positions.unsqueeze(0), now).float()
            if recorder is not None and rows is not None:
                step.routes = recorder.read(len(rows.names))
            token.copy_(logits.argmax(-1))
            positions.add_(1)
            return logits

        step = _Step(run, keep=[ready, rows, now])
        if self.graphs:
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            before = token.clone(), positions.clone()

            def undo() -> None:
                token.copy_(before[0])
                positions.copy_(before[1])

            step.captured = capture(run, undo, self.device, pool=self._memory)
            self.graphs = step.captured is not None
        return step

    @contextmanager
    def _routed(self, options: RoutingOptions | None, ready: Any, recorder: LastRoutes | None) -> Iterator[None]:
        state = find_meteora(self.model)
        if state is None:
            yield
        elif ready is None:
            assert options is not None
            with state.apply(options):
                yield
        else:
            with nullcontext() if recorder is None else state.record(recorder), state.apply_fixed(ready):
                yield
