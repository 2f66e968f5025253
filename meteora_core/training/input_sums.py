"""The sums over tokens from which gates in closed form are solved, and the runs of rows that are summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from meteora_core.errors import MeteoraError
from meteora_core.progress import ProgressBar
from meteora_core.routing import IGNORE, meteora_of
from meteora_core.training.encoding import TrainRow, collate

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
    for row in (part for each in rows for part in each.parts):
        labels = torch.tensor(row.gate_labels)
        for kind, part in enumerate((labels[: row.response_start], labels[row.response_start :])):
            counts[:, kind] += torch.bincount(part[part != IGNORE], minlength=adapters).float()
    shares = counts if answer_share is None else torch.tensor([1 - answer_share, answer_share]) * (counts > 0)
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-9)
    return shares * counts.sum() / adapters / counts.clamp(min=1)


Way = Literal["own", "base", "routed"]
"""How rows run: each token with its own adapter, on the base model alone, or with the adapters that the gates choose."""


@dataclass(frozen=True)
class Pass:
    """A forward pass whose layer inputs are summed.

    Attributes:
        way: How the rows run.
        rows: Rows of the batch.
        table: Weight of a prompt token and of a response token of each adapter, float32 (N, 2).
    """

    way: Way
    rows: Sequence[TrainRow]
    table: Tensor


@dataclass(frozen=True)
class Run:
    """Rows that run in the same way.

    Attributes:
        way: How the rows run.
        share: Share of these rows in the weight of each adapter.
        batches: Rows of each forward pass.
    """

    way: Way
    share: float
    batches: Sequence[Sequence[TrainRow]]


def passes_of(runs: Sequence[Run], adapters: int, answer_share: float | None) -> list[Pass]:
    """The forward passes of several runs, with weights that give the tokens of every adapter a total weight of 1.

    If a run has no rows of an adapter, the other runs have its share of the adapter's weight.

    Args:
        runs: The runs.
        adapters: Number of adapters N.
        answer_share: Share of an adapter's weight that its response tokens have; see :func:`token_weights`.
    """
    tables = []
    for run in runs:
        rows = [row for batch in run.batches for row in batch]
        counted = sum(label != IGNORE for row in rows for label in row.gate_labels)
        tables.append(token_weights(rows, adapters, answer_share).double() * run.share * adapters / max(1, counted))
    present = torch.stack([run.share * (table.sum(1) > 0) for run, table in zip(runs, tables, strict=True)]).sum(0)
    tables = [(table / present.clamp(min=1e-9)[:, None]).float() for table in tables]
    return [Pass(run.way, batch, table) for run, table in zip(runs, tables, strict=True) for batch in run.batches]


def own_and_base(batches: Sequence[Sequence[TrainRow]], base_share: float) -> list[Run]:
    """Divide batches into rows that run with their own adapters, and rows that run on the base model alone: evenly among the rows of each adapter.

    Args:
        batches: Rows of each forward pass; they may belong to different adapters.
        base_share: Share of the rows that run on the base model alone, and of their weight.
    """
    drawn: Counter[frozenset[int]] = Counter()
    own: list[list[TrainRow]] = []
    base: list[list[TrainRow]] = []
    for batch in batches:
        parts: tuple[list[TrainRow], list[TrainRow]] = ([], [])
        for row in batch:
            key = frozenset(row.gate_labels)
            before = int(drawn[key] * base_share)
            drawn[key] += 1
            parts[int(drawn[key] * base_share) > before].append(row)
        own.append(parts[0])
        base.append(parts[1])
    runs = [Run("own", 1 - base_share, [batch for batch in own if batch]), Run("base", base_share, [batch for batch in base if batch])]
    return [run for run in runs if run.batches]


@lru_cache(maxsize=1)
def fast_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(check()) for check in checks if check is not None)


def filled_labels(labels: Tensor) -> Tensor:
    """Labels, int64 (batch, tokens), in which unlabelled positions have the label of the last labelled position before them, or 0 if there is none."""
    positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last = torch.where(labels != IGNORE, positions, 0).cummax(1).values
    return labels.gather(1, last).clamp(min=0)


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


def sum_inputs(model: nn.Module, sums: InputSums, passes: Iterable[Pass], pad_token: int, *, whole: bool, half: bool, bar: ProgressBar) -> None:
    """Run rows through a model with attached adapters while ``sums`` observes its layers.

    Args:
        model: The model.
        sums: Sums that observe layers of the model (:meth:`InputSums.observing`).
        passes: The forward passes.
        pad_token: Token id of the padding.
        whole: Whether the whole model runs, or only its decoder, without the output layer.
        half: Whether a float32 model on a CPU computes linear layers in bfloat16 if the CPU has instructions for it (:func:`fast_bfloat16`).
        bar: Progress bar that advances by 1 with each pass.
    """
    state, first = meteora_of(model), next(model.parameters())
    decoder = model if whole else getattr(model, "base_model", model)
    half = half and first.device.type == "cpu" and first.dtype == torch.float32 and fast_bfloat16()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for each in passes:
            batch = collate(each.rows, pad_token).to(first.device)
            labels = batch.gate_labels.reshape(-1)
            keep = labels != IGNORE
            sums.table = each.table
            sums.begin(keep, labels[keep], batch.response.reshape(-1)[keep])
            own = state.force(filled_labels(batch.gate_labels)) if each.way == "own" else nullcontext()
            with state.disabled() if each.way == "base" else own:
                decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            bar.update(1)
