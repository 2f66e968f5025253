"""Gates in closed form: ridge regression of the wanted adapter on each layer's input, in one pass without gradients.

An extension of the paper, offered as ``--init ridge``: gradient training then only has to finish the work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.model.attach import meteora_layers
from meteora_core.model.tokens import check_observable
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE, meteora_of
from meteora_core.training.encoding import Batch, TrainRow

SHRINK = 1e-2
"""Ridge strength, as a share of the mean squared activation times the number of tokens."""


_STRIPES = 4


def token_weights(rows: Iterable[TrainRow], adapters: int, answer_share: float | None) -> Tensor:
    """Weights by which all adapters weigh the same over the rows.

    Args:
        rows: That the closed form will see.
        adapters: N.
        answer_share: Share of an adapter's weight that its answers' tokens have together; None: all its tokens weigh the same.

    Returns:
        float32 (N, 2), of a token of a prompt and of an answer; the mean over all labelled tokens is 1. An adapter that has tokens of one kind
        alone has all its weight there, one without tokens has zeros.
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
    """Set every gate to the ridge solution on the given rows, every token routed to its labelled adapter meanwhile.

    Per layer, with inputs ``X`` (tokens, h), one-hot labels ``Y`` (tokens, N) less ``1/N``, and the weights ``D`` of tokens,
    ``G = scale * ((X^T D X + lambda I)^-1 X^T D Y)^T`` (Hoerl and Kennard, 1970). ``scale`` turns regression values, which differ
    by about one between right and wrong, into logits.

    Args:
        model: With adapters attached.
        batches: Labelled rows, on the model's device.
        total: How many batches, for the progress bar.
        weights: float32 (N, 2), of prompt and answer tokens of each adapter; see :func:`token_weights`.
        scale: Of the logits.
        progress: Where to report.

    Returns:
        How many tokens were seen.

    Raises:
        UsageError: Nothing is attached, or an adapter targets one expert of many.
        MeteoraError: The rows hold no label of some adapter, or the sums do not fit in memory.
    """
    state = meteora_of(model)
    layers = dict(meteora_layers(model))
    adapters = len(state.names)
    check_observable(layers, "the closed-form start of the gates")
    sums = InputSums(adapters, weights.to(next(iter(layers.values())).gate.device))
    hooks = [layer.register_forward_pre_hook(sums.hook) for layer in layers.values()]
    seen = torch.zeros(adapters)
    model.eval()
    whole = any(layer.is_output for layer in layers.values())  # the output layer is no part of the decoder
    decoder = model if whole else getattr(model, "base_model", model)
    try:
        with progress.task("gates: closed-form start", total=total, unit="batches") as bar:
            for batch in batches:
                labels = batch.gate_labels
                keep = labels.reshape(-1) != IGNORE
                wanted = labels.reshape(-1)[keep]
                sums.begin(keep, wanted, batch.response.reshape(-1)[keep])
                seen += torch.bincount(wanted.cpu(), minlength=adapters).float()
                with state.force(filled_labels(labels)):
                    decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                bar.update(1)
    except torch.OutOfMemoryError as error:
        raise MeteoraError("out of memory in the closed-form start of the gates", hint="use --init zeros for a model of this width") from error
    finally:
        for hook in hooks:
            hook.remove()
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
    """Labels (batch, tokens) in which a position without one has that of the last labelled position before it, or adapter 0."""
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last = torch.where(labels != IGNORE, places, 0).cummax(1).values
    return labels.gather(1, last).clamp(min=0)


def ridge_rows(squares: Tensor, means: Tensor) -> Tensor:
    """The rows of a gate, before the scale: the ridge solution of one layer from its sums.

    A common factor of ``squares`` and ``means`` cancels, since the ridge strength is a share of the mean square.

    Args:
        squares: float64 (h, h), ``X^T D X``; it is changed.
        means: float64 (N, h), row ``a`` is the weighted sum of the inputs of adapter ``a``.

    Returns:
        float64 (N, h).
    """
    targets = means - means.sum(0, keepdim=True) / len(means)
    squares.diagonal().add_(SHRINK * squares.diagonal().mean())
    return torch.linalg.solve(squares, targets.t()).t()


class InputSums:
    """``X^T D X`` and ``X^T D Y``, summed by hooks once per distinct input (``q_proj``, ``k_proj`` and ``v_proj`` share theirs).

    Args:
        adapters: N.
        table: float32 (N, 2), weights of a token of a prompt and of an answer of each adapter.
        most_bytes: Size of the sums; inputs beyond it are postponed. None sets no limit. One input is summed in any case.
        done: Keys of inputs that are not to be summed, since an earlier pass did.

    Attributes:
        postponed: Keys of inputs that need another pass.
        of: ``id`` of a layer -> key of its input: the ``id`` of the first layer that reads it.
        squares: Key -> float32 (h, h), of which only the lower triangle counts; see :meth:`square`.
        means: Key -> float32 (N, h).
    """

    def __init__(self, adapters: int, table: Tensor, most_bytes: int | None = None, done: Collection[int] = ()) -> None:
        self.adapters, self.table, self.most_bytes, self.done = adapters, table, most_bytes, done
        self.postponed: set[int] = set()
        self.of: dict[int, int] = {}
        self.squares: dict[int, Tensor] = {}
        self.means: dict[int, Tensor] = {}
        self._last: tuple[Tensor, int] | None = None

    def square(self, key: int) -> Tensor:
        """The symmetric matrix of an input, float32 (h, h); a new tensor."""
        lower = self.squares[key].tril()
        return lower + lower.tril(-1).t()

    def begin(self, keep: Tensor, wanted: Tensor, answer: Tensor) -> None:
        """Say which tokens the next forward pass has.

        Args:
            keep: bool (positions,), which positions count.
            wanted: int64, adapter of each position that counts.
            answer: bool, whether each position that counts belongs to an answer.
        """
        self.keep, self.wanted, self._last = keep, wanted, None
        self.weights = self.table.to(wanted.device)[wanted, answer.long()]

    def _is_full(self, width: int) -> bool:
        """Whether there is no room for another input."""
        held = sum(square.numel() for square in self.squares.values())
        return self.most_bytes is not None and bool(held) and 4 * (held + width * width) > self.most_bytes

    def hook(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the input of a layer; a forward pre-hook."""
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
            self.squares[key] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            self.means[key] = torch.zeros(self.adapters, x.shape[-1], device=x.device)
        step = -(-x.shape[-1] // _STRIPES)
        for start in range(0, x.shape[-1], step):  # the lower triangle in stripes, as the upper one is its mirror image: 5/8 of the products
            stop = start + step
            self.squares[key][start:stop, :stop].addmm_(weighted[:, start:stop].t(), rows[:, :stop])
        self.means[key].index_add_(0, wanted, weighted)
