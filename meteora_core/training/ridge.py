"""Gates in closed form: ridge regression of each token's adapter on the input of each layer, in one pass without gradients.

This extends the paper (``--init ridge``): training by gradients then starts from the closed-form gates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.model.attach import meteora_layers
from meteora_core.model.tokens import check_observable
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE, meteora_of
from meteora_core.training.encoding import Batch, TrainRow

SHRINK = 1e-2
"""Ridge strength, relative to the mean squared activation times the number of tokens."""


_STRIPES = 4
"""Number of stripes in which the lower triangle of a sum is computed."""


def token_weights(rows: Iterable[TrainRow], adapters: int, answer_share: float | None) -> Tensor:
    """Token weights that give all adapters the same total weight over the rows.

    Args:
        rows: Rows from which the gates will be computed.
        adapters: Number of adapters N.
        answer_share: Fraction of an adapter's weight that its response tokens have together; None gives all its tokens the same weight.

    Returns:
        float32 (N, 2), the weight of a prompt token and of a response token of each adapter. The mean over all labelled tokens is 1. If an adapter has only
        prompt tokens or only response tokens, these have its whole weight; an adapter without tokens has weights of 0.
    """
    counts = torch.zeros(adapters, 2)
    for row in rows:
        labels = torch.tensor(row.gate_labels)
        for kind, part in enumerate((labels[: row.response_start], labels[row.response_start :])):
            counts[:, kind] += torch.bincount(part[part != IGNORE], minlength=adapters).float()
    shares = counts if answer_share is None else torch.tensor([1 - answer_share, answer_share]) * (counts > 0)
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-9)
    return shares * counts.sum() / adapters / counts.clamp(min=1)


@torch.no_grad()
def ridge_gates(model: nn.Module, batches: Iterable[Batch], total: int, weights: Tensor, *, scale: float = 8.0, progress: Progress = SILENT) -> int:
    """Set every gate to the ridge solution on the given rows; every token is routed to its labelled adapter.

    Per layer, with inputs ``X`` (tokens, h), one-hot labels ``Y`` (tokens, N) minus ``1/N``, and the diagonal matrix ``D`` of token weights,
    ``G = scale * ((X^T D X + lambda I)^-1 X^T D Y)^T`` (Hoerl and Kennard, 1970). ``scale`` turns regression values, which differ
    by about one between right and wrong, into logits.

    Args:
        model: Model with attached adapters.
        batches: Batches of labelled rows, on the model's device.
        total: Number of batches, for the progress bar.
        weights: Weight of a prompt token and of a response token of each adapter, float32 (N, 2); see :func:`token_weights`.
        scale: Factor of the gates, and so of their logits.
        progress: Object that progress is reported to.

    Returns:
        The number of labelled tokens in the batches.

    Raises:
        UsageError: No adapters are attached, or an adapter targets single experts of a mixture of experts.
        MeteoraError: An adapter labels no token of the rows, or the sums do not fit in memory.
    """
    state = meteora_of(model)
    layers = dict(meteora_layers(model))
    adapters = len(state.names)
    check_observable(layers, "the closed-form start of the gates")
    sums = InputSums(adapters, weights.to(next(iter(layers.values())).gate.device))
    seen = torch.zeros(adapters)
    model.eval()
    whole = any(layer.is_output for layer in layers.values())  # the output layer is not part of the decoder
    decoder = model if whole else getattr(model, "base_model", model)
    failure = MeteoraError("out of memory in the closed-form start of the gates", hint="use --init zeros for a model of this width")
    with sums.observing(layers.values(), failure), progress.task("gates: closed-form start", total=total, unit="batches") as bar:
        for batch in batches:
            labels = batch.gate_labels
            keep = labels.reshape(-1) != IGNORE
            wanted = labels.reshape(-1)[keep]
            sums.begin(keep, wanted, batch.response.reshape(-1)[keep])
            seen += torch.bincount(wanted.cpu(), minlength=adapters).float()
            with state.force(filled_labels(labels)):
                decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            bar.update(1)
    if (seen == 0).any():
        missing = [name for name, count in zip(state.names, seen.tolist(), strict=True) if not count]
        raise MeteoraError(f"no row is labelled with {', '.join(missing)}", hint="raise train_gates.ridge_tokens, or give every adapter a dataset")
    solved: dict[int, Tensor] = {}
    with progress.task("gates: solving", total=len(layers), unit="layers") as bar:
        for layer in layers.values():
            key = sums.of[id(layer)]
            if key not in solved:
                solved[key] = ridge_rows(sums.square(key).double(), sums.means[key].double()).float() * scale
            layer.gate.copy_(solved[key])
            bar.update(1)
    state.gates = "closed form"
    return int(seen.sum())


def filled_labels(labels: Tensor) -> Tensor:
    """Labels, int64 (batch, tokens), in which unlabelled positions have the label of the last labelled position before them, or 0 if there is none."""
    positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last = torch.where(labels != IGNORE, positions, 0).cummax(1).values
    return labels.gather(1, last).clamp(min=0)


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


class InputSums:
    """``X^T D X`` and ``X^T D Y``, which hooks sum once per distinct input (``q_proj``, ``k_proj`` and ``v_proj`` have the same input).

    Args:
        adapters: Number of adapters N.
        table: Weight of a prompt token and of a response token of each adapter, float32 (N, 2).
        most_bytes: Maximum size of the sums in bytes; inputs that exceed it are postponed. At least one input is summed. None sets no limit.
        done: Keys of the inputs that an earlier pass has summed; they are skipped.

    Attributes:
        postponed: Keys of inputs that need another pass.
        of: Key of each layer's input, by the layer's ``id``. The key is the ``id`` of the first layer that reads the input.
        squares: ``X^T D X`` of each input, float32 (h, h), by key; only the lower triangle is valid, see :meth:`square`.
        means: Weighted sum of the inputs of each adapter's tokens, float32 (N, h), by key.
    """

    def __init__(self, adapters: int, table: Tensor, most_bytes: int | None = None, done: Collection[int] = ()) -> None:
        self.adapters, self.table, self.most_bytes, self.done = adapters, table, most_bytes, done
        self.postponed: set[int] = set()
        self.of: dict[int, int] = {}
        self.squares: dict[int, Tensor] = {}
        self.means: dict[int, Tensor] = {}
        self._last: tuple[Tensor, int] | None = None

    def square(self, key: int) -> Tensor:
        """The symmetric matrix ``X^T D X`` of an input, float32 (h, h), as a new tensor."""
        lower = self.squares[key].tril()
        return lower + lower.tril(-1).t()

    @contextmanager
    def observing(self, modules: Iterable[nn.Module], failure: MeteoraError) -> Iterator[None]:
        """Sum the inputs of modules in the forward passes of the block. If memory runs out, ``failure`` is raised."""
        hooks = [module.register_forward_pre_hook(self.hook) for module in modules]
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise failure from error
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, keep: Tensor, wanted: Tensor, answer: Tensor) -> None:
        """Set the labels of the tokens of the next forward pass.

        Args:
            keep: Whether each position is counted, bool (positions,).
            wanted: Adapter of each counted position, int64.
            answer: Whether each counted position belongs to a response, bool.
        """
        self.keep, self.wanted, self._last = keep, wanted, None
        self.weights = self.table.to(wanted.device)[wanted, answer.long()]

    def _columns(self, width: int) -> int:
        """The number of columns of the sum of an input with ``width`` features."""
        return width

    def _is_full(self, width: int) -> bool:
        """Whether the sums of another input with ``width`` features would exceed the maximum size."""
        held = sum(square.numel() for square in self.squares.values())
        return self.most_bytes is not None and bool(held) and 4 * (held + width * self._columns(width)) > self.most_bytes

    def hook(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the input of a layer to the sums. This is a forward pre-hook."""
        x = arguments[0]
        if self._last is not None and self._last[0] is x:
            self.of[id(layer)] = self._last[1]
            return
        key = self.of.setdefault(id(layer), id(layer))
        self._last = (x, key)
        if key in self.done:
            return
        if key in self.postponed or (key not in self.squares and self._is_full(x.shape[-1])):
            self.postponed.add(key)
            return
        keep, wanted, weights = (tensor.to(x.device) for tensor in (self.keep, self.wanted, self.weights))  # layers may be spread over devices
        rows = x.reshape(-1, x.shape[-1])[keep].float()
        weighted = rows * weights[:, None]
        if key not in self.squares:
            self.squares[key] = torch.zeros(x.shape[-1], self._columns(x.shape[-1]), device=x.device)
            self.means[key] = torch.zeros(self.adapters, x.shape[-1], device=x.device)
        self._add(key, rows, weighted)
        self.means[key].index_add_(0, wanted, weighted)

    def _add(self, key: int, rows: Tensor, weighted: Tensor) -> None:
        """Add tokens (n, h) and the same tokens times their weights to the sum of an input."""
        step = -(-rows.shape[-1] // _STRIPES)
        for start in range(0, rows.shape[-1], step):  # only the lower triangle, in stripes: 5/8 of the products
            stop = start + step
            self.squares[key][start:stop, :stop].addmm_(weighted[:, start:stop].t(), rows[:, :stop])
