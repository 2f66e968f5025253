"""How a kernel cuts its work."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How a kernel cuts its work; powers of two but for ``stages``. A path reads the fields that its page in docs/kernels names.

    Attributes:
        tokens: Tokens of a program.
        outputs: Outputs of a program.
        step: Columns of h at a time.
        warps: Warps of a program.
        stages: Steps in flight.
        gate_rows: Rows of G (and of A, where all are read) of a program.
        gate_step: Columns of h at a time, of those programs.
        down_rows: Chosen rows of A of a program.
        down_step: Columns of h at a time, of those programs.
    """

    tokens: int = 16
    outputs: int = 64
    step: int = 128
    warps: int = 4
    stages: int = 3
    gate_rows: int = 16
    gate_step: int = 128
    down_rows: int = 16
    down_step: int = 256
