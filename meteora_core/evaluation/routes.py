"""Counts of the adapters chosen for a task's tokens, per layer.

After generation, the model reads each prompt with its answer once more, in one pass, while a recorder adds up the choices on the device. A causal model
makes the same choices as during generation (up to rounding), so generation itself is not slowed down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.data.tasks import Task
from meteora_core.routing import Routes, meteora_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora_core.errors import NonFiniteError

PARTS = ("prompt", "answer")
KINDS = ("top1", "chosen", "weight")
"""Quantities that are counted for each token: its top-1 adapter, all its top-k adapters, and their weights."""

Text = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its answer."""


@dataclass
class RouteCounts(Routes):
    """A recorder that adds up the routes instead of storing them.

    Attributes:
        counts: Counts of each layer by path, float64 (2, 3, N) on the layer's device; the dimensions are :data:`PARTS`, :data:`KINDS` and the N adapters.
        tokens: Number of tokens in each part, int64 (2,).
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    _parts: Tensor | None = None

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Count the choices of one layer in one forward call.

        Args:
            path: Module path of the layer.
            indices: Indices of the chosen adapters, int64 (batch, tokens, k) or (tokens, k).
            weights: Mixing weights of the chosen adapters, floating point, of the same shape.
        """
        assert self._parts is not None, "only within one_batch"
        top_k, adapters = indices.shape[-1], len(self.names)
        indices, weights = indices.detach().reshape(-1, top_k), weights.detach().reshape(-1, top_k).double()
        dense = torch.zeros(3, indices.shape[0], adapters, dtype=torch.float64, device=indices.device)
        dense[0].scatter_(-1, indices[:, :1], 1.0)
        dense[1].scatter_(-1, indices, 1.0)
        dense[2].scatter_(-1, indices, weights)
        added = torch.einsum("pt,ktn->pkn", self._parts.to(indices.device), dense)
        self.counts[path] = self.counts[path] + added if path in self.counts else added

    @contextmanager
    def one_batch(self, parts: Tensor) -> Iterator[None]:
        """Context manager in which :meth:`add` counts the tokens of a batch.

        Args:
            parts: Part of each token, float64 (2, batch * tokens): 1 if the token belongs to the part, else 0.
        """
        self._parts = parts
        try:
            yield
        finally:
            self._parts = None
        self.tokens += parts.sum(1).long().cpu()

    def merge(self, other: RouteCounts) -> None:
        """Add the counts of another recorder."""
        for path, added in other.counts.items():
            self.counts[path] = self.counts[path] + added.to(self.counts[path].device) if path in self.counts else added
        self.tokens += other.tokens


def count_routes(model: PreTrainedModel, texts: Sequence[Text], pad: int, counts: RouteCounts) -> None:
    """Read a batch of finished texts and add the choices of every layer to ``counts``.

    Rows are padded on the right, where padding does not influence a causal model, and the padding is not counted. A batch that does not fit into GPU memory is
    halved. The output layer is not run.

    Args:
        model: A model with adapters attached, in evaluation mode, with the routing settings of the evaluation.
        texts: Token ids of prompts and answers.
        pad: Id of the padding token.
        counts: Recorder to which the counts are added.

    Raises:
        torch.OutOfMemoryError: A single row does not fit into memory.
        NonFiniteError: Mixing weights are NaN or infinite.
    """
    waiting = [list(texts)] if texts else []
    while waiting:
        batch = waiting.pop()
        batch_counts = RouteCounts(counts.names)
        try:
            _count(model, batch, pad, batch_counts)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            waiting += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        counts.merge(batch_counts)


@torch.inference_mode()
def _count(model: PreTrainedModel, texts: Sequence[Text], pad: int, counts: RouteCounts) -> None:
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.full((len(texts), width), pad)
    parts = torch.zeros(2, len(texts), width, dtype=torch.float64)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        parts[0, row, : len(prompt)] = 1
        parts[1, row, len(prompt) : len(prompt) + len(answer)] = 1
    device = next(model.parameters()).device
    ids, mask, flat = ids.to(device), parts.sum(0).long().to(device), parts.reshape(2, -1).to(device)
    with meteora_of(model).record(counts), counts.one_batch(flat), torch.compiler.set_stance("force_eager"):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    totals = [layer[:, KINDS.index("weight")].sum().cpu() for layer in counts.counts.values()]
    if totals and not bool(torch.stack(totals).isfinite().all()):
        raise _broken(model, texts)


def _broken(model: PreTrainedModel, texts: Sequence[Text]) -> NonFiniteError:
    """The error for the first text with a layer whose output is not finite."""
    from meteora_core.generation.nonfinite import non_finite_error
    from meteora_core.model.nonfinite import first_nonfinite_module

    device = next(model.parameters()).device
    for prompt, answer in texts:
        ids = [*prompt, *answer]
        if first_nonfinite_module(model, lambda ids=ids: model(input_ids=torch.tensor([ids], device=device), use_cache=False)):  # type: ignore[misc]
            return non_finite_error(model, ids)
    return non_finite_error(model, [*texts[0][0], *texts[0][1]])


@dataclass(frozen=True)
class RoutingSummary:
    """The counts of one task.

    Attributes:
        task: Name of the task.
        own: Names of the task's own adapters: the adapter with the task's name, or those of a composite's members; may be empty.
        names: Names of all N adapters.
        paths: Module paths of the layers, in the model's order.
        counts: Counts as in :class:`RouteCounts`, float64 (layers, 2, 3, N), on the CPU.
        tokens: Number of tokens in the prompts and in the answers.
    """

    task: str
    own: tuple[str, ...]
    names: tuple[str, ...]
    paths: tuple[str, ...]
    counts: Tensor
    tokens: tuple[int, int]

    @classmethod
    def of(cls, task: Task, counts: RouteCounts) -> RoutingSummary:
        """Build the summary of a recorder's counts."""
        tasks = task.members or (task.name,)
        own = tuple(name for name in counts.names if name in tasks)
        paths = tuple(counts.counts)
        stacked = torch.stack([counts.counts[path].cpu() for path in paths]) if paths else torch.zeros(0, 2, 3, len(counts.names), dtype=torch.float64)
        prompt, answer = counts.tokens.tolist()
        return cls(task.name, own, counts.names, paths, stacked, (prompt, answer))

    def layer_shares(self, kind: str, part: str) -> Tensor:
        """Share of tokens for which each layer chose each adapter, or each adapter's mean weight; float64 (layers, N).

        Args:
            kind: Quantity, one of :data:`KINDS`.
            part: Part of the text: "prompt", "answer", or "all".
        """
        parts = [index for index, name in enumerate(PARTS) if part in ("all", name)]
        return self.counts[:, parts, KINDS.index(kind)].sum(1) / max(self.total(part), 1)

    def total(self, part: str) -> int:
        """Number of tokens in a part: "prompt", "answer", or "all"."""
        return sum(count for count, name in zip(self.tokens, PARTS, strict=True) if part in ("all", name))

    def shares(self, kind: str, part: str) -> Tensor:
        """Mean of :meth:`layer_shares` over the layers; float64 (N,)."""
        shares = self.layer_shares(kind, part)
        return shares.mean(0) if len(shares) else torch.zeros(len(self.names), dtype=torch.float64)

    def own_by_layer(self, part: str) -> Tensor | None:
        """Share of tokens in each layer whose top-1 adapter is the task's own; float64 (layers,). None without such an adapter or without tokens."""
        if not self.own or not self.total(part):
            return None
        return self.layer_shares("top1", part)[:, [self.names.index(name) for name in self.own]].sum(1)

    def own_share(self, part: str) -> float | None:
        """Mean of :meth:`own_by_layer` over the layers."""
        by_layer = self.own_by_layer(part)
        return None if by_layer is None or not len(by_layer) else float(by_layer.mean())

    def document(self) -> dict[str, Any]:
        """The summary as plain values for the results file: shares over all layers, and the share of the task's own adapter per layer."""

        def named(kind: str, part: str) -> dict[str, float]:
            return dict(zip(self.names, [round(value, 6) for value in self.shares(kind, part).tolist()], strict=True))

        layers = {part: self.own_by_layer(part) for part in ("answer", "all")}
        return {
            "own_adapters": list(self.own),
            "tokens": dict(zip(PARTS, self.tokens, strict=True)),
            "own_top1": {part: self.own_share(part) for part in ("answer", "all")},
            **{kind: {part: named(kind, part) for part in ("answer", "all")} for kind in KINDS},
            "own_top1_by_layer": {
                part: None if values is None else dict(zip(self.paths, [round(value, 6) for value in values.tolist()], strict=True))
                for part, values in layers.items()
            },
        }

    def counts_document(self) -> dict[str, Any]:
        """The counts as plain values: for each kind and part, one list per layer with one number per adapter."""
        document: dict[str, Any] = {"tokens": dict(zip(PARTS, self.tokens, strict=True))}
        for kind_index, kind in enumerate(KINDS):
            values = {part: self.counts[:, index, kind_index].tolist() for index, part in enumerate(PARTS)}
            document[kind] = values if kind == "weight" else {part: [[int(cell) for cell in row] for row in rows] for part, rows in values.items()}
        return document


def counts_file(summaries: Mapping[str, RoutingSummary]) -> dict[str, Any]:
    """The counts of all tasks as one document with the keys ``adapters``, ``layers`` and ``tasks``."""
    first = next(iter(summaries.values()))
    return {"adapters": list(first.names), "layers": list(first.paths), "tasks": {task: summary.counts_document() for task, summary in summaries.items()}}
