"""Second moments of low rank, from a sketch that is summed in one pass: wide models never need a square matrix of their layer inputs."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor

from meteora_core.training.input_sums import InputSums

RANK = 112
"""Rank of the stored second moments of a layer input."""

_SEED = 20240
_OVERSAMPLING = 2


class SketchedSums(InputSums):
    """``X^T D X Omega`` for a fixed Gaussian ``Omega`` (h, 2 r) instead of ``X^T D X``, and the diagonal of ``X^T D X``.

    :meth:`factor` approximates ``X^T D X`` by a matrix of rank r (Nyström's method; Tropp, Yurtsever, Udell and Cevher, 2017, algorithm 3). It is exact,
    apart from rounding, for up to r tokens. For h up to 2 r, ``Omega`` is the identity.

    Args:
        adapters: Number of adapters N.
        table: Weight of a prompt token and of a response token of each adapter, float32 (N, 2).
        most_bytes: Maximum size of the sums in bytes; see :class:`~meteora_core.training.input_sums.InputSums`.
        done: Keys of the inputs that an earlier pass has summed; they are skipped.

    Attributes:
        squares: ``X^T D X Omega`` of each input, float32 (h, 2 r), by key.
        diagonals: The diagonal of ``X^T D X``, float32 (h,), by key.
    """

    def __init__(self, adapters: int, table: Tensor, most_bytes: int | None = None, done: Collection[int] = ()) -> None:
        super().__init__(adapters, table, most_bytes, done)
        self.diagonals: dict[int, Tensor] = {}

    def _columns(self, width: int) -> int:
        return min(width, _OVERSAMPLING * RANK)

    def _add(self, key: int, rows: Tensor, weighted: Tensor) -> None:
        omega = _omega(rows.shape[-1], self._columns(rows.shape[-1])).to(rows.device)
        self.squares[key].addmm_(weighted.t(), rows @ omega)
        self.diagonals[key] = self.diagonals.get(key, torch.zeros_like(rows[0])) + (weighted * rows).sum(0)

    def factor(self, key: int) -> Tensor:
        """A factor ``F``, float64 (r, h) on the CPU, such that ``F^T F`` approximates ``X^T D X`` of an input from below."""
        sketch = self.squares[key].to("cpu", torch.float64)
        width, columns = sketch.shape
        omega = _omega(width, columns).double()
        shift = torch.finfo(torch.float32).eps * sketch.norm()  # the sketch was summed in float32
        if not shift:
            return torch.zeros(min(RANK, columns), width, dtype=torch.float64)
        failed = 1
        while failed:  # the sketch of a narrow input may be a little indefinite
            shifted = sketch + shift * omega
            core = omega.t() @ shifted
            lower, failed = torch.linalg.cholesky_ex((core + core.t()) / 2)
            shift, last = 10 * shift, shift
        _, values, vectors = torch.linalg.svd(torch.linalg.solve_triangular(lower, shifted.t(), upper=False), full_matrices=False)
        rank = min(RANK, columns)
        return (values[:rank].square() - last).clamp(min=0).sqrt()[:, None] * vectors[:rank]


@lru_cache(maxsize=4)
def _omega(width: int, columns: int) -> Tensor:
    if columns == width:
        return torch.eye(width)
    return torch.randn(width, columns, generator=torch.Generator().manual_seed(_SEED + width))
