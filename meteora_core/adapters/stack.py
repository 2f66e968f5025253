"""The stacked adapters of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """The stacked adapters of one linear layer.

    Attributes:
        A: Tensor of shape (R, in): the adapters' A matrices, concatenated by rows; R is the sum of ``ranks``.
        B: Tensor of shape (R, out): the adapters' transposed B matrices, concatenated by rows.
        ranks: The rank of each of the N adapters; 0 if an adapter does not target this layer.
        scaling: float32 tensor of shape (N,): the scaling of each adapter; 0 if its rank is 0.
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
