"""Block sizes of a kernel."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Block sizes of a kernel: powers of two, except for ``stages``. A path reads the fields that its page in docs/kernels names.

    Attributes:
        tokens: Number of tokens per program.
        outputs: Number of outputs per program.
        step: Number of input columns per loop step.
        warps: Number of warps per program.
        stages: Number of loop steps whose loads are in flight at the same time.
        gate_rows: Number of rows of G (and of A, where all are read) per program.
        gate_step: Number of input columns per loop step of the programs that compute gates.
        down_rows: Number of chosen rows of A per program.
        down_step: Number of input columns per loop step of the programs that compute chosen rows of A.
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
