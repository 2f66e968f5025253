"""Decoding steps as CUDA graphs.

Kernel launches dominate the time of a small model's decoding step; a CUDA graph replaces them by a single launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meteora_core.generation.constants import RememberedConstants
from meteora_core.reading import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedStep:
    """A decoding step captured in a CUDA graph.

    Attributes:
        graph: The CUDA graph, which replays the step on the tensors it was captured with.
        output: The tensor that the step returned; every replay overwrites it.
        constants: Tensors that the graph's kernels read and that must live as long as the graph.
    """

    graph: torch.cuda.CUDAGraph
    output: Tensor
    constants: RememberedConstants

    def replay(self) -> Tensor:
        """Run the step once more.

        Returns:
            :attr:`output`, valid until the next replay.
        """
        self.graph.replay()
        return self.output


def capture(step: Callable[[], Tensor], undo: Callable[[], object], device: torch.device, *, pool: Any = None) -> CapturedStep | None:
    """Capture a step in a CUDA graph.

    The step first runs once on a side stream, which loads its kernels, allocates its workspaces and copies its constants to the device.

    Args:
        step: The function to capture. It works in place on tensors with fixed addresses and copies nothing between host and device.
        undo: A function that reverts the changes of one run of ``step``.
        device: The CUDA device that the step runs on.
        pool: Memory pool (``torch.cuda.graph_pool_handle()``) to share with graphs whose outputs are not needed when this one is replayed; None for
            separate memory.

    Returns:
        The captured step, not yet replayed; or None, with a warning in the log, if the step cannot be captured. The state is unchanged in both cases.

    Raises:
        torch.OutOfMemoryError: The graph does not fit into GPU memory.
    """
    constants = RememberedConstants()
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side), constants:
                    step()
            finally:
                torch.cuda.current_stream().wait_stream(side)
                undo()
            if constants.written():
                raise RuntimeError("the model overwrites tensors that it creates from Python numbers")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool), constants:
                output = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _log.warning("the model's decoding steps cannot be captured in a CUDA graph and run without one: %s", first_line(error))
        return None
    return CapturedStep(graph, output, constants)
