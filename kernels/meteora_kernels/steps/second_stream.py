"""A second CUDA stream for launches that do not depend on the base's product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@contextmanager
def on_second_stream(x: Tensor) -> Iterator[Callable[[], None]]:
    """A context that runs its launches on a second stream while a CUDA graph is captured, and on the current stream otherwise.

    Yields:
        A function that makes the current stream wait for these launches.
    """
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)
