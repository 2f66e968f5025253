"""Tables of a few rows, for tests of what is run by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from meteora_kernels import plan
from meteora_kernels.plan import Row, Table
from meteora_kernels.plan.table import shipped

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def taking(*group: Row, layer: tuple[Row, ...] = ()) -> Iterator[None]:
    """Within the block, these rows are the table; a list that is empty stays what it is by default."""
    default = shipped("default")
    before = plan.use(DEVICE, Table("test", group or default.group, layer or default.layer))
    try:
        yield
    finally:
        plan.use(DEVICE, before)
