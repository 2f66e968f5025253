"""Gates in closed form: ridge regression of each token's adapter on the input of each layer, in one pass without gradients.

This extends the paper (``--init ridge``): training by gradients then starts from the closed-form gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.model.attach import meteora_layers
from meteora_core.model.layer import MeteoraLinear
from meteora_core.model.tokens import check_observable
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE, meteora_of
from meteora_core.training.encoding import TrainRow
from meteora_core.training.input_sums import InputSums, Run, own_and_base, passes_of, sum_inputs

SHRINK = 1e-2
"""Ridge strength, relative to the mean squared activation times the number of tokens."""

SCALE = 8.0
"""Factor of the gates, and so of their logits."""

BASE_SHARE = 0.25
"""Share of an adapter's weight that comes from running its rows on the base model alone."""

ROUNDS = 1
"""Number of further runs of the rows, as the gates from the runs before route them."""


@dataclass(frozen=True)
class RidgeOptions:
    """How rows determine gates in closed form.

    Attributes:
        answer_share: Share of an adapter's weight that its response tokens have; see :func:`meteora_core.training.input_sums.token_weights`.
        base_share: Share of the rows that run on the base model alone; the others run with their own adapters.
        rounds: Number of further runs of all rows, in each of which they are routed by the gates from the runs before. All runs have the same weight.
        half: Whether a float32 model on a CPU computes linear layers in bfloat16 if the CPU has instructions for it.
    """

    answer_share: float | None = None
    base_share: float = BASE_SHARE
    rounds: int = ROUNDS
    half: bool = True


@torch.no_grad()
def ridge_gates(
    model: nn.Module, batches: Sequence[Sequence[TrainRow]], pad_token: int, options: RidgeOptions = RidgeOptions(), *, progress: Progress = SILENT
) -> int:
    """Set every gate to the ridge solution on the given rows; every token is routed to its labelled adapter.

    Per layer, with inputs ``X`` (tokens, h), one-hot labels ``Y`` (tokens, N) minus ``1/N``, and the diagonal matrix ``D`` of token weights,
    ``G = 8 ((X^T D X + lambda I)^-1 X^T D Y)^T`` (Hoerl and Kennard, 1970). The factor turns regression values, which differ
    by about one between right and wrong, into logits.

    The inputs of a layer depend on the adapters of the layers before it. First, most rows run with their own adapters and some on the base model alone. Then
    the gates from these rows route all rows, the sums of this run are added, and the gates are solved again: in use, gates meet inputs after their own
    choices, right and wrong (dataset aggregation; Ross, Gordon and Bagnell, 2011).

    Args:
        model: Model with attached adapters.
        batches: Rows of each batch.
        pad_token: Token id of the padding.
        options: How rows determine the gates.
        progress: Object that progress is reported to.

    Returns:
        The number of labelled tokens in the batches.

    Raises:
        UsageError: No adapters are attached, or an adapter targets single experts of a mixture of experts.
        MeteoraError: An adapter labels no token of the rows, or the sums do not fit in memory.
    """
    state, layers = meteora_of(model), dict(meteora_layers(model))
    check_observable(layers, "the closed-form start of the gates")
    seen = Counter(label for batch in batches for row in batch for label in row.gate_labels if label != IGNORE)
    if missing := [name for index, name in enumerate(state.names) if not seen[index]]:
        raise MeteoraError(f"no row is labelled with {', '.join(missing)}", hint="raise train_gates.ridge_tokens, or give every adapter a dataset")
    first = passes_of(own_and_base(batches, options.base_share), len(state.names), options.answer_share)
    routed = passes_of([Run("routed", 1.0, batches)], len(state.names), options.answer_share)
    sums = InputSums(len(state.names), routed[0].table)
    whole = any(layer.is_output for layer in layers.values())  # the output layer is not part of the decoder
    failure = MeteoraError("out of memory in the closed-form start of the gates", hint="use --init zeros for a model of this width")
    for number, passes in enumerate([first, *[routed] * options.rounds]):
        title = f"gates: routed rows, round {number}" if number else "gates: closed-form start"
        with sums.observing(layers.values(), failure), progress.task(title, total=len(passes), unit="batches") as bar:
            sum_inputs(model, sums, passes, pad_token, whole=whole, half=options.half, bar=bar)
        _solve(layers, sums, progress)
    state.gates = "closed form"
    return seen.total()


def _solve(layers: Mapping[str, MeteoraLinear], sums: InputSums, progress: Progress) -> None:
    """Set the gates of layers to the ridge solution of their sums."""
    solved: dict[int, Tensor] = {}
    with progress.task("gates: solving", total=len(layers), unit="layers") as bar:
        for layer in layers.values():
            key = sums.of[id(layer)]
            if key not in solved:
                solved[key] = ridge_rows(sums.square(key).double(), sums.means[key].double()).float() * SCALE
            layer.gate.copy_(solved[key])
            bar.update(1)


def ridge_targets(means: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(X^T D Y)^T``: the one-hot labels minus their weighted mean, times the inputs.

    Args:
        means: Weighted mean of the inputs of each adapter's tokens, float64 (N, h).
        weights: Weight of each adapter, float64 (N,); None weights all adapters equally.

    Returns:
        float64 (N, h).
    """
    weights = means.new_ones(len(means)) if weights is None else weights
    weighted = weights[:, None] * means
    return weighted - (weights / weights.sum())[:, None] * weighted.sum(0, keepdim=True)


def ridge_rows(squares: Tensor, means: Tensor, weights: Tensor | None = None) -> Tensor:
    """The ridge solution of one layer from its sums: the gate before it is multiplied by the scale.

    A common factor of ``squares`` and ``means`` cancels out, because the ridge strength is proportional to the mean square.

    Args:
        squares: ``X^T D X``, float64 (h, h); it is modified.
        means: Weighted sum of the inputs of each adapter's tokens, float64 (N, h).
        weights: Weight of each adapter, with which ``squares`` were summed, float64 (N,); None weights all adapters equally.

    Returns:
        The rows of the gate, float64 (N, h).
    """
    targets = ridge_targets(means, weights)
    squares.diagonal().add_(SHRINK * squares.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(squares)
    if failed:  # rounded sums may be a little indefinite
        return torch.linalg.solve(squares, targets.t()).t()
    return torch.cholesky_solve(targets.t(), factor).t()


def ridge_rows_low_rank(factor: Tensor, diagonal: Tensor, means: Tensor, weights: Tensor | None = None) -> Tensor:
    """:func:`ridge_rows` for second moments ``F^T F + diag(d)``, by the identity of Woodbury if ``F`` has fewer rows than columns.

    Args:
        factor: ``F``, float64 (R, h).
        diagonal: ``d``, float64 (h,).
        means: Weighted sum of the inputs of each adapter's tokens, float64 (N, h).
        weights: Weight of each adapter; see :func:`ridge_rows`.

    Returns:
        The rows of the gate, float64 (N, h).
    """
    if factor.shape[0] >= factor.shape[1]:
        return ridge_rows(torch.addmm(torch.diag(diagonal), factor.t(), factor), means, weights)
    targets = ridge_targets(means, weights)
    scale = diagonal + SHRINK * (diagonal + factor.square().sum(0)).mean()
    scaled = factor / scale
    core = scaled @ factor.t()
    core.diagonal().add_(1.0)
    first = targets / scale
    return first - torch.cholesky_solve(factor @ first.t(), torch.linalg.cholesky(core)).t() @ scaled
