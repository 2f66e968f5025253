"""Steps as CUDA graphs: a small model's step is bound by its kernel launches, and a graph launches all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_core.generation.constants import RememberedConstants
from meteora_core.reading import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedStep:
    """A step that was captured in a CUDA graph.

    Attributes:
        graph: Replays the step on the tensors that it was captured with.
        output: What the step returned; every replay writes to it.
        constants: Tensors that the graph's kernels read, which must live as long as the graph.
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


def capture(step: Callable[[], Tensor], undo: Callable[[], None], device: torch.device) -> CapturedStep | None:
    """Capture a step in a CUDA graph.

    The step runs once beforehand, on a side stream, so that kernels are loaded, workspaces exist and constants are on the device.

    Args:
        step: Works in place on tensors that stay where they are, and copies nothing from or to the host.
        undo: Sets back what one run of the step has changed.
        device: A CUDA device.

    Returns:
        The captured step, not yet replayed; None, with a warning in the log, where it cannot be captured. The state is as before in both cases.

    Raises:
        torch.OutOfMemoryError: The graph's memory does not fit.
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
                raise RuntimeError("the model writes to what it makes from numbers")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), constants:
                output = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _log.warning("this model's steps cannot be captured in a CUDA graph, it is run without: %s", first_line(error))
        return None
    return CapturedStep(graph, output, constants)
