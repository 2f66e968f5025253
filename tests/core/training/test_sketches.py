"""Second moments of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meteora_core.training.input_sums import InputSums
from meteora_core.training.ridge import SHRINK, ridge_rows, ridge_rows_low_rank, ridge_targets
from meteora_core.training.sketches import RANK, SketchedSums


def summed(kind: type[InputSums], batches: list[torch.Tensor]) -> tuple[InputSums, int]:
    sums, layer = kind(1, torch.tensor([[0.5, 2.0]])), nn.Linear(batches[0].shape[-1], 2)
    for x in batches:
        answer = torch.arange(len(x)) % 3 == 0
        sums.begin(torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.long), answer)
        sums.hook(layer, (x,))
    return sums, id(layer)


@pytest.mark.parametrize(("width", "tokens"), [(40, 300), (600, 60), (600, 900)])
def test_a_sketch_approximates_the_second_moments_from_below(width, tokens) -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1).float() ** -1.5  # as of activations: a few directions hold most of the norm
    x = torch.randn(tokens, width, generator=generator) * spectrum @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    batches = list(x.split(25))
    whole, key = summed(InputSums, batches)
    sketch, other = summed(SketchedSums, batches)
    assert isinstance(sketch, SketchedSums)
    square, factor = whole.square(key).double(), sketch.factor(other)
    assert factor.shape == (min(RANK, width), width)
    rest = square - factor.t() @ factor
    values = torch.linalg.eigvalsh(square)
    left_out = float(values[: max(0, width - RANK)].clamp(min=0).sum())  # the best possible error in the nuclear norm
    assert float(torch.linalg.eigvalsh(rest).abs().sum()) <= 1.3 * left_out + 1e-3 * float(values.sum())
    assert torch.linalg.eigvalsh(rest).min() > -1e-4 * values.max()
    assert torch.allclose(sketch.diagonals[other], whole.square(key).diagonal(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(sketch.means[other], whole.means[key])


def test_an_input_of_zeros_has_a_factor_of_zeros() -> None:
    sketch, key = summed(SketchedSums, [torch.zeros(5, 300)])
    assert isinstance(sketch, SketchedSums)
    assert not sketch.factor(key).any()


@pytest.mark.parametrize("rank", [5, 40])
def test_gates_of_low_rank_moments_are_those_of_the_same_moments_written_out(rank) -> None:
    generator = torch.Generator().manual_seed(1)
    factor, diagonal, means = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rank, 24), (24,), (3, 24)))
    whole = factor.t() @ factor + torch.diag(diagonal.abs())
    assert torch.allclose(ridge_rows_low_rank(factor, diagonal.abs(), means), ridge_rows(whole, means), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("low", [False, True])
def test_weights_of_adapters_are_those_of_their_tokens(low) -> None:
    """Two adapters with 30 and 20 tokens, the second with half the weight: the regression over all tokens at once, written out."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randn(count, 6, dtype=torch.float64, generator=generator) + index for index, count in enumerate((30, 20))]
    shares = torch.tensor([1.0, 0.5], dtype=torch.float64)
    X = torch.cat(tokens)
    D = torch.cat([torch.full((len(part),), float(share) / len(part), dtype=torch.float64) for part, share in zip(tokens, shares, strict=True)])
    Y = torch.zeros(50, 2, dtype=torch.float64)
    Y[:30, 0], Y[30:, 1] = 1, 1
    Y -= (D[:, None] * Y).sum(0) / D.sum()
    squares = (X * D[:, None]).t() @ X
    expected = torch.linalg.solve(squares + SHRINK * squares.diagonal().mean() * torch.eye(6), (X * D[:, None]).t() @ Y).t()
    means = torch.stack([part.mean(0) for part in tokens])
    if low:
        found = ridge_rows_low_rank(torch.linalg.cholesky(squares).t()[:6], torch.zeros(6, dtype=torch.float64), means, shares)
    else:
        found = ridge_rows(squares, means, shares)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_equal_weights_are_on_the_device_of_the_sums() -> None:
    """The meta device stands for a GPU: PyTorch refuses operations on tensors of two devices."""
    means = torch.zeros(3, 4, dtype=torch.float64, device="meta")
    assert ridge_targets(means).device == means.device
