"""Groups of layers that share their input and run as one."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from meteora_core.fused.layout import Layout
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import Meteora
from meteora_core.routing.routes import ChosenRecorder
from meteora_kernels import Group
from meteora_kernels.operators import eager

_log = logging.getLogger(__name__)

MOST = 16
"""The largest number of adapters per token for which groups are used."""
PATIENCE = 4
"""Number of times that the members of a group may be called with different inputs; after more, the layers run separately."""


class FusedGroup:
    """One to three layers that run as one: the first member that is called with an input computes the outputs of all members.

    Args:
        layers: The members, in the order in which their model calls them.

    Attributes:
        layout: The block of memory that holds the members' weights.
        inputs: Memory for the group's inputs, into which the module before the group can write.
    """

    def __init__(self, layers: Sequence[MeteoraLinear]) -> None:
        self.layers = tuple(layers)
        self.state = layers[0].state
        self.layout = Layout(layers)
        self.inputs = Inputs(self.layout.group, self.state)
        self._outputs = Outputs(len(layers))
        self._chosen: Tensor | None = None
        self._device, self._kind = self.layout.group.packed.get_device(), self.layout.group.packed.device.type
        self._failed = False

    def output(self, member: int, x: Tensor) -> Tensor | None:
        """The output of a member, base weights and adapters together.

        Args:
            member: Index of the member in the group.
            x: Input of the group, (..., h).

        Returns:
            The output in the dtype of ``x``, (..., o) with the member's o; None if the layer must compute it separately.
        """
        compiling = is_compiling()
        version = (0, 0) if compiling else (self.state.version, 0 if x.is_inference() else x._version)
        if not torch.is_grad_enabled() and (waiting := self._outputs.take(member, x, version)) is not None:
            self._report(member)
            return waiting
        if not self.usable(x):
            return None
        outputs = self._run(x) if compiling else self._run_or_fail(x)
        if outputs is None:
            return None
        if len(outputs) == 1:
            self._report(member)
            return outputs[0]
        self._outputs.put(outputs, x, version)
        self._report(member)
        return self._outputs.take(member, x, version)

    def _report(self, member: int) -> None:
        """Report the choices of a member in the last run to the model's recorder."""
        recorder, chosen, layer = self.state.mode.recorder, self._chosen, self.layers[member]
        if recorder is None or chosen is None:
            return
        assert isinstance(recorder, ChosenRecorder)
        recorder.add_chosen(layer.path, chosen[member], output=layer.is_output)
        if member == len(self.layers) - 1:
            self._chosen = None

    def usable(self, x: Tensor) -> bool:
        """Whether the layers can run as one on the input ``x`` (..., h) in the current mode."""
        state, first, weight = self.state, self.layers[0], self.layout.group.packed
        mode = state.mode
        if self._failed or not mode.grouped or state.backend not in ("auto", "triton") or self._outputs.misses > PATIENCE:
            return False
        if mode.observed and (is_compiling() or (mode.rows is not None and mode.rows.width > MOST)):
            return False
        if torch.is_grad_enabled() or (first.dropout and first.training) or x.dtype != weight.dtype or x.get_device() != self._device:
            return False
        if torch.is_autocast_enabled(self._kind) or x.numel() == 0 or x.dim() == 1:
            return False
        return is_compiling() or self.layout.is_current()

    def _run_or_fail(self, x: Tensor) -> Sequence[Tensor] | None:
        """:meth:`_run`, or None if a kernel cannot be built on this machine (too little shared memory, no compiler); the group then never runs again."""
        try:
            self.layout.refresh()
            return self._run(x)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            self._failed = True
            self._outputs.clear()
            warn_once(str(x.device), str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None

    def _run(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs of all members, each (..., o) with the member's o."""
        import meteora_kernels.group  # needs Triton; "from … import" takes 0.7 us longer

        group, routing = self.layout.group, self.state.group_routing(x.device, output=self.layers[0].is_output)
        if self.state.mode.recorder is not None:
            self._chosen = x.new_empty(len(self.layers), x.shape[:-1].numel(), 2 * routing.top_k, dtype=torch.float32)
            routing = routing._replace(chosen=self._chosen)
        in_place = self.inputs.owns(x)
        return meteora_kernels.group.run_members(x if in_place else x.contiguous(), group, routing, in_place=in_place)


class Inputs:
    """Allocates memory for the next input of a group, and recognises this memory when the group is called with it.

    In prefill, a group multiplies ``[x, h]`` by ``[W, B^T]``, where ``h`` is the routed and scaled ``A x``. The allocated rows have additional columns for
    h, so that x does not have to be copied (:mod:`meteora_kernels.wide`).

    Args:
        group: The weights of the group.
        state: Routing state of the model; its top-k determines which kernels run.
    """

    def __init__(self, group: Group, state: Meteora) -> None:
        self._group, self._state = group, state
        self._last: weakref.ref[Tensor] | None = None

    def new(self, shape: torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor for the group's next input, of shape ``shape`` (..., h), in the dtype and on the device of ``like``."""
        from meteora_kernels.group import reads_in_place  # needs Triton

        tokens, wide = shape[:-1].numel(), self._group.wide
        rows = self._state.mode.rows
        top_k = self._state.routing.top_k if rows is None or rows.grouped is None else rows.grouped.top_k
        if wide is None or not reads_in_place(self._group, tokens, top_k):
            return like.new_empty(shape)
        new = wide.new_rows(shape, like)
        self._last = weakref.ref(new)
        return new

    def owns(self, x: Tensor) -> bool:
        """Whether ``x`` (..., h) is the tensor that :meth:`new` returned last, or a view of all of it; False while a compiler traces."""
        if self._last is None or not eager(x):
            return False
        last, wide = self._last(), self._group.wide
        if last is None or wide is None:
            return False
        # While the last tensor exists, no other tensor has its address.
        if x is last or x.data_ptr() != last.data_ptr() or x.numel() != last.numel():
            return x is last
        return x.stride() == (wide.row, 1) or (x.shape == last.shape and x.stride() == last.stride())


class Outputs:
    """The outputs that the first member of a group computed for the other members.

    An output is returned once, and only for the same input tensor, with unchanged values and routing.

    Args:
        members: The number of members.

    Attributes:
        misses: Number of times that outputs were computed and not used, because a member was called with another input than the member before it.
    """

    def __init__(self, members: int) -> None:
        self._stored: list[Tensor | None] = [None] * members
        self._waiting = 0
        self._input: Tensor | None = None
        self._version = (0, 0)
        self.misses = 0

    def take(self, member: int, x: Tensor, version: tuple[int, int]) -> Tensor | None:
        """Return and remove the stored output of a member.

        Args:
            member: Index of the member in the group.
            x: The input tensor of the member.
            version: Counters that increase when the routing or the input's values change.

        Returns:
            The output, (..., o); None if none is stored for this input.
        """
        if self._input is not x or self._version != version:
            return None
        output, self._stored[member] = self._stored[member], None
        if output is not None:
            self._waiting -= 1
            if not self._waiting:
                self._input = None
        return output

    def put(self, outputs: Sequence[Tensor], x: Tensor, version: tuple[int, int]) -> None:
        """Store the outputs of all members, computed from ``x``; they replace earlier ones."""
        if self._waiting:
            self.misses += 1
        self._stored, self._waiting, self._input, self._version = list(outputs), len(outputs), x, version

    def clear(self) -> None:
        """Delete the stored outputs."""
        self._stored, self._waiting, self._input = [None] * len(self._stored), 0, None


@cache
def warn_once(device: str, reason: str) -> None:
    """Log a warning that fused layers cannot run on a device, once for each device and reason."""
    _log.warning("fused layers cannot run on %s (%s); the layers run separately", device, reason)
