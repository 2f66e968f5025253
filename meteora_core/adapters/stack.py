"""The stacked adapters of one linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pending:
    """The parts of one adapter in one layer that can only be used together with the base layer's weight; see :func:`resolved`.

    Attributes:
        magnitude: The magnitude vector of DoRA (out,); None for an adapter without DoRA.
        bias: The trained bias (out,), which replaces that of the base layer; None if the bias was not trained.
        whole: Whether ``A`` is the identity and ``B`` a trained weight that replaces that of the base layer, as ``modules_to_save`` has it.
    """

    magnitude: Tensor | None = None
    bias: Tensor | None = None
    whole: bool = False


@dataclass(frozen=True)
class Stack:
    """The stacked adapters of one linear layer.

    Attributes:
        A: Tensor of shape (R, in): the adapters' A matrices, concatenated by rows; R is the sum of ``ranks``.
        B: Tensor of shape (R, out): the adapters' transposed B matrices, concatenated by rows.
        ranks: The number of rows of each of the N adapters; 0 if an adapter does not target this layer.
        scaling: float32 tensor of shape (N,): the scaling of each adapter; 0 if its rank is 0.
        scale: float32 tensor of shape (N, out): the factor minus 1 by which each adapter multiplies the base layer's output before the bias, as DoRA
            does; None if no adapter does.
        shift: float32 tensor of shape (N, out): the vector that each adapter adds to the output; None if no adapter does.
        pending: The parts that depend on the base layer, by the adapter's index. They have no effect before :func:`resolved`.
        experts: The number of experts of a layer that holds the weights of all experts of a mixture, each with its own rows (``ranks`` counts those of
            all experts, expert by expert); 1 for an ordinary linear layer.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    pending: Mapping[int, Pending] = field(default_factory=dict)
    experts: int = 1

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[1]

    @property
    def tables(self) -> tuple[str, ...]:
        """Which of ``scale`` and ``shift`` the stack has, or will have once its pending parts are resolved."""
        parts = self.pending.values()
        scaled = self.scale is not None or any(part.magnitude is not None for part in parts)
        shifted = self.shift is not None or any(part.bias is not None for part in parts)
        return (*(["scale"] if scaled else []), *(["shift"] if shifted else []))

    def rows(self, index: int) -> slice:
        """Return the rows of A and B that belong to an adapter."""
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])

    def chosen(self, indices: Sequence[int]) -> Stack:
        """Return the stack of some of the adapters, in the given order."""
        rows = [row for index in indices for row in range(self.rows(index).start, self.rows(index).stop)]
        return replace(
            self,
            A=self.A[rows].contiguous(),
            B=self.B[rows].contiguous(),
            ranks=tuple(self.ranks[index] for index in indices),
            scaling=self.scaling[list(indices)],
            scale=_used(self.scale, indices),
            shift=_used(self.shift, indices),
            pending={new: self.pending[index] for new, index in enumerate(indices) if index in self.pending},
        )


def table(rows: Sequence[Tensor | None], width: int) -> Tensor | None:
    """Stack rows of a table (N, width) in float32, with zeros for missing rows; None if all are missing."""
    if all(row is None for row in rows):
        return None
    return torch.stack([torch.zeros(width) if row is None else row.detach().float().reshape(width) for row in rows])


def resolved(stack: Stack, weight: Tensor, bias: Tensor | None = None) -> Stack:
    """Return a stack without pending parts, for a base layer.

    DoRA (Liu et al., arXiv 2402.09353) computes ``m / ||W + s B A|| * (W + s B A) x``, with the norm of every row. The factor
    ``c = m / ||W + s B A||`` depends on the weights alone and is computed once, here: the rows of ``B`` are multiplied by it, and ``c - 1`` goes into
    ``scale``, so that the adapter adds ``(c - 1) W x + s (c B) A x`` to the base layer's output. A bias or a weight that replaces the base layer's
    becomes the difference from it.

    Args:
        stack: The adapters of the layer.
        weight: The base layer's weight (out, in), of a floating dtype.
        bias: The base layer's bias (out,), if it has one.

    Example:
        >>> import torch
        >>> from meteora_core.adapters.stack import Pending, Stack, resolved
        >>> dora = Stack(torch.zeros(1, 2), torch.zeros(1, 2), (1,), torch.ones(1), pending={0: Pending(magnitude=torch.tensor([10.0, 2.0]))})
        >>> resolved(dora, torch.tensor([[3.0, 4.0], [0.0, 1.0]])).scale
        tensor([[1., 1.]])
    """
    if not stack.pending:
        return stack
    wide = torch.float64 if stack.A.dtype == torch.float64 else torch.float32
    W, B = weight.detach().cpu().to(wide), stack.B.clone()
    count, width = len(stack.ranks), stack.out_features
    scale = [None if stack.scale is None else stack.scale[index] for index in range(count)]
    shift = [None if stack.shift is None else stack.shift[index] for index in range(count)]
    for index, part in stack.pending.items():
        rows = stack.rows(index)
        if part.whole:
            B[rows] = (B[rows].to(wide) - W.t()).to(B.dtype)
        if part.magnitude is not None:
            factor = dora_factor(W, stack.A[rows], B[rows], float(stack.scaling[index]), part.magnitude)
            B[rows] = (B[rows].to(wide) * factor).to(B.dtype)
            scale[index] = factor - 1
        if part.bias is not None:
            own = torch.zeros(width, dtype=wide) if bias is None else bias.detach().cpu().to(wide)
            shift[index] = part.bias.cpu().to(wide) - own
    return replace(stack, B=B, scale=table(scale, width), shift=table(shift, width), pending={})


def dora_factor(W: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """Return ``m / ||W + s B A||``, of shape (out,), from W (out, in), A (r, in), B (r, out) and m (out,), in the dtype of W."""
    whole = torch.addmm(W, B.t().to(W.dtype), A.to(W.dtype), alpha=scaling)
    return magnitude.cpu().to(W.dtype) / torch.linalg.vector_norm(whole, dim=1)


def _used(values: Tensor | None, indices: Sequence[int]) -> Tensor | None:
    """Return some rows of a table, or None if all of them are zeros."""
    if values is None:
        return None
    rows = values[list(indices)].contiguous()
    return rows if bool(rows.any()) else None
