"""Refinement of closed-form gates: a few steps on the softmax loss, computed from the means and second moments of each adapter's tokens alone.

Ridge regression fits indicators and so spends as much effort on tokens that are routed rightly by far as on those at the border. The cross-entropy of the
router does not, but needs the distribution of the tokens. Here the inputs of each adapter's tokens are taken as normally distributed with the mean and the
covariance of its statistics, so that no rows are needed and the gates depend on the statistics only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from meteora_core.training.ridge import SHRINK

@dataclass(frozen=True)
class RidgeSystem:
    """The factorised matrix of a ridge regression.

    Attributes:
        solve: Function that solves for the rows of a matrix, float64 (N, h).
        strength: The ridge strength, an addend of the diagonal.
    """

    solve: Callable[[Tensor], Tensor]
    strength: float


def ridge_system(squares: Tensor) -> RidgeSystem:
    """Factorise ``X^T D X + lambda I``.

    Args:
        squares: ``X^T D X``, float64 (h, h); it is modified.
    """
    strength = float(SHRINK * squares.diagonal().mean())
    squares.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(squares)
    if failed:  # rounded sums may be a little indefinite
        return RidgeSystem(lambda rows: torch.linalg.solve(squares, rows.t()).t(), strength)
    return RidgeSystem(lambda rows: torch.cholesky_solve(rows.t(), factor).t(), strength)


def ridge_system_low_rank(factor: Tensor, diagonal: Tensor) -> RidgeSystem:
    """:func:`ridge_system` for second moments ``F^T F + diag(d)``, by the identity of Woodbury if ``F`` has fewer rows than columns.

    Args:
        factor: ``F``, float64 (R, h).
        diagonal: ``d``, float64 (h,).
    """
    if factor.shape[0] >= factor.shape[1]:
        return ridge_system(torch.addmm(torch.diag(diagonal), factor.t(), factor))
    strength = float(SHRINK * (diagonal + factor.square().sum(0)).mean())
    scale = diagonal + strength
    scaled = factor / scale
    core = scaled @ factor.t()
    core.diagonal().add_(1.0)
    root = torch.linalg.cholesky(core)

    def solve(rows: Tensor) -> Tensor:
        first = rows / scale
        return first - torch.cholesky_solve(factor @ first.t(), root).t() @ scaled

    return RidgeSystem(solve, strength)


def ridge_targets(means: Tensor) -> Tensor:
    """``(X^T D Y)^T``, float64 (N, h), from the weighted sum of the inputs of each adapter's tokens, float64 (N, h)."""
    return means - means.sum(0, keepdim=True) / len(means)


STEPS = 10
"""Number of steps; stopping early regularises."""

_DRAWS = 512
_SEED = 20_1127


class Moments(Protocol):
    """Second moments of the inputs of one adapter's tokens."""

    def times(self, rows: Tensor) -> Tensor:
        """The product of rows, float64 (N, h), with the second moments (h, h)."""


@dataclass(frozen=True)
class WholeMoments:
    """Second moments as a matrix, float64 (h, h)."""

    squares: Tensor

    def times(self, rows: Tensor) -> Tensor:
        return rows @ self.squares


@dataclass(frozen=True)
class LowRankMoments:
    """Second moments ``F^T F + diag(d)`` with ``F``, float64 (r, h), and ``d``, float64 (h,)."""

    factor: Tensor
    diagonal: Tensor

    def times(self, rows: Tensor) -> Tensor:
        return (rows @ self.factor.t()) @ self.factor + rows * self.diagonal


def refined(gate: Tensor, system: RidgeSystem, means: Tensor, moments: Sequence[Moments], steps: int = STEPS, weights: Sequence[float] | None = None) -> Tensor:
    """Gates that have a lower softmax loss than the given ones, which are a start.

    The loss is the mean over adapters of the expected cross-entropy of the gates' softmax for a token of this adapter, plus a penalty with the ridge strength.
    With logits ``G x`` and ``x`` normally distributed, the gradient follows from expectations over N normally distributed logits (Stein's lemma), for which
    fixed random numbers are used. The Hessian is at most half of the second moments (Böhning, 1992), so each step solves the ridge system once more;
    steps are accelerated (Nesterov, 1983).

    Args:
        gate: Gates that the steps start from, float64 (N, h), as logits.
        system: The ridge system of the sum of all second moments.
        means: Mean input of each adapter's tokens, float64 (N, h).
        moments: Second moments of each adapter's tokens.
        weights: Weight of each adapter; the ridge system has the same weights.
        steps: Number of steps; 0 returns ``gate``.

    Returns:
        The gates, float64 (N, h).
    """
    weights = weights or [1.0] * len(means)
    count = sum(weights)
    normals = _normals(len(means)).to(means.device)
    now, ahead, momentum = gate, gate, 1.0
    for _ in range(steps):
        gradient = ahead * (system.strength / (2 * count))
        for index, (mean, second) in enumerate(zip(means, moments, strict=True)):
            centre = ahead @ mean  # the mean of the logits
            cross = second.times(ahead) - torch.outer(centre, mean)  # the covariance of logits and inputs
            covariance = cross @ ahead.t()
            chances = (centre + normals @ _root(covariance).t()).softmax(-1)
            expected = chances.mean(0)
            slopes = torch.diag(expected) - chances.t() @ chances / len(chances)
            expected[index] -= 1
            gradient += weights[index] * (torch.outer(expected, mean) + slopes @ cross) / count
        following = ahead - 2 * count * system.solve(gradient)
        after = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / after * (following - now)
        now, momentum = following, after
    return now


def _root(covariance: Tensor) -> Tensor:
    """A matrix whose product with its transpose is a covariance, which may be a little asymmetric or indefinite by rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
    return vectors * values.clamp(min=0).sqrt()


@lru_cache(maxsize=8)
def _normals(count: int) -> Tensor:
    """Standard normal numbers in pairs of opposite sign, float64 (draws, count)."""
    half = torch.randn(_DRAWS, count, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    return torch.cat([half, -half])
