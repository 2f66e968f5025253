"""Layers that share their input and run as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from meteora_core.fused.inputs import Inputs
from meteora_core.fused.layout import Layout
from meteora_core.fused.outputs import Outputs
from meteora_core.model.layer import MeteoraLinear
from meteora_kernels.operators import eager, on_device_of

_log = logging.getLogger(__name__)

PATIENCE = 4
"""A group whose members were called with different inputs more often than this runs no longer as one."""


class FusedGroup:
    """One to three layers that run as one: the first member that meets an input computes the outputs of all.

    Args:
        layers: The members, in the order in which their model calls them.

    Attributes:
        layout: Where the members' weights are.
        inputs: Memory for the group's inputs, for whoever computes them.
    """

    def __init__(self, layers: Sequence[MeteoraLinear]) -> None:
        self.layers = tuple(layers)
        self.state = layers[0].state
        self.layout = Layout(layers)
        self.inputs = Inputs(self.layout.group, self.state)
        self._outputs = Outputs(len(layers))
        self._failed = False

    def output(self, member: int, x: Tensor) -> Tensor | None:
        """The output of a member, base and adapters, or None where the layer has to compute it by itself.

        Args:
            member: Its index.
            x: (..., h).

        Returns:
            (..., width of the member) in the dtype of ``x``, or None.
        """
        compiling = torch.compiler.is_compiling()
        version = (0, 0) if compiling else (self.state.version, 0 if x.is_inference() else x._version)
        if not torch.is_grad_enabled() and (waiting := self._outputs.take(member, x, version)) is not None:
            return waiting
        if not self.usable(x):
            return None
        outputs = self._run(x) if compiling else self._run_or_fail(x)
        if outputs is None or len(outputs) == 1:
            return None if outputs is None else outputs[0]
        self._outputs.put(outputs, x, version)
        return self._outputs.take(member, x, version)

    def usable(self, x: Tensor) -> bool:
        """Whether the layers may run as one on this input."""
        mode, first, weight = self.state.mode, self.layers[0], self.layout.group.packed
        if self._failed or not mode.enabled or mode.observed or self.state.backend not in ("auto", "triton") or self._outputs.misses > PATIENCE:
            return False
        if torch.is_grad_enabled() or (first.dropout and first.training) or x.dtype != weight.dtype or x.device != weight.device:
            return False
        if torch.is_autocast_enabled(x.device.type) or x.numel() == 0:
            return False
        return torch.compiler.is_compiling() or self.layout.is_current()

    def _run_or_fail(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """:meth:`_run`; None where a kernel cannot be built here (too little shared memory, no compiler), and then the group never runs again."""
        try:
            return self._run(x)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            self._failed = True
            self._outputs.clear()
            warn_once(str(x.device), str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all members."""
        from meteora_kernels.group import run_group  # needs Triton

        group = self.layout.group
        flat = x.reshape(-1, x.shape[-1])
        with on_device_of(x):
            in_place = False
            if eager(x):
                self.layout.refresh()
                in_place = self.inputs.made(flat)
            output = run_group(flat if in_place else flat.contiguous(), group, self.state.routing_on(x.device), in_place=in_place)
        return torch.split(output.view(*x.shape[:-1], -1), list(group.adapters.widths), dim=-1)


@cache
def warn_once(device: str, reason: str) -> None:
    """Log that fused layers cannot run on a device, once for each reason."""
    _log.warning("fused layers cannot run on %s (%s); the layers run apart", device, reason)
