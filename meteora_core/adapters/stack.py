"""All adapters of one linear layer, stacked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """All adapters on one linear layer.

    Attributes:
        A: (R, in), the adapters' A by rows, R = sum of ``ranks``.
        B: (R, out), row ``j`` is column ``j`` of the usual (out, R) matrix.
        ranks: One rank per adapter of the bank; 0 where an adapter does not target this layer.
        scaling: float32 (N,); 0 where the rank is 0.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: Tensor

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[1]
