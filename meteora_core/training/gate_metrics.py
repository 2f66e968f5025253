"""Gate loss and gate accuracy, logged during training and measured on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meteora_core.progress import SILENT, Progress
from meteora_core.routing import IGNORE, GateObservations, meteora_of
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.distributed import SINGLE, OnModel, Runtime
from meteora_core.training.encoding import Batch, collate
from meteora_core.training.loss import lm_losses
from meteora_core.training.task_rows import HeldOut

COMPOSITES = "composites"
"""The name under which held-out composites are reported."""


def hit_sum(hits: dict[str, Tensor], where: Tensor) -> Tensor:
    """The number of positions in ``where`` whose top-1 adapter was correct, averaged over layers: a float32 scalar."""
    return torch.stack([layer & where for layer in hits.values()]).sum().float() / len(hits)


def by_task(prefix: str, values: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The sum and count, float32 (2,), of a value per position, for each task.

    Args:
        prefix: First part of the result's keys, ``<prefix>/<task>``.
        values: Value of each position, float (positions,).
        labels: Task index of each position, int64 (positions,); -100 for positions without a task.
        names: Names of the tasks, by index.
    """
    keep = labels != IGNORE
    sums = torch.zeros(2, len(names), device=values.device)
    sums[0].index_add_(0, labels[keep], values[keep].float())
    sums[1] = torch.bincount(labels[keep], minlength=len(names)).float()
    return {f"{prefix}/{name}": sums[:, index] for index, name in enumerate(names)}


def gate_tallies(observed: GateObservations, batch: Batch, losses: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Gate accuracy and language-model loss per task, gate accuracy and loss per kind of layer (``q_proj``, …).

    Args:
        observed: Observations of a forward pass, before its backward pass.
        batch: Batch of that forward pass.
        losses: Loss of each position, from :func:`meteora_core.training.loss.lm_losses`.
        names: Names of the adapters.

    Returns:
        A sum and its count by name, float32 (2,) each.
    """
    labels = batch.gate_labels.reshape(-1)
    where = labels != IGNORE
    count = where.sum().float()
    hits = torch.stack(list(observed.hits.values()))
    tallies = by_task("accuracy", hits.float().mean(0), labels, names)
    targets = batch.targets.reshape(-1) != IGNORE
    tallies |= by_task("lm", losses, torch.where(targets, labels, IGNORE), names)
    kinds: dict[str, list[int]] = {}
    for index, path in enumerate(observed.hits):
        kinds.setdefault(path.rpartition(".")[2], []).append(index)
    right = (hits & where).sum(1).float()
    losses_by_layer = torch.stack([loss.detach().float() for loss in observed.loss_sums[: len(observed.hits)]])
    for kind, indices in kinds.items():
        tallies[f"accuracy/{kind}"] = torch.stack([right[indices].sum(), count * len(indices)])
        tallies[f"gate/{kind}"] = torch.stack([losses_by_layer[indices].sum(), count * len(indices)])
    return tallies


def is_first_layer(path: str) -> bool:
    """Whether a linear belongs to decoder layer 0, whose q, k and v see one token without context."""
    return any(part == "0" for part in path.split("."))


_SUMS = ("lm", "targets", "gate", "labels", "all", "response", "response_labels")


@torch.no_grad()
def measure_gates(
    model: nn.Module, held_out: HeldOut, *, runtime: Runtime = SINGLE, on_model: OnModel | None = None, progress: Progress = SILENT
) -> dict[str, float]:
    """Gate loss and top-1 accuracy on held-out rows.

    Args:
        model: A model with adapters attached.
        held_out: The rows of each adapter, and composites.
        runtime: The processes; each measures a part of the rows.
        on_model: Function that calls another function on a wrapped model; None calls it on the model directly.
        progress: Where progress is reported.

    Returns:
        ``gate_accuracy`` (top-1, response tokens, all decoder layers but the first), ``gate_accuracy_all`` (all tokens and layers), ``gate_loss``,
        ``lm_loss``, and ``gate_accuracy/<task>``, ``gate_loss/<task>``, ``lm_loss/<task>``; ``gate_accuracy/composites`` and so on when there are any,
        and ``gate_accuracy/<kind of layer>``. Empty when there are no rows.
    """
    state = meteora_of(model)
    model.eval()
    on_model = on_model or (lambda work: work(model))
    names, composites, batch_size = held_out.names, held_out.composites, held_out.batch_size
    device = runtime.device or next(model.parameters()).device
    groups = [*zip(names, held_out.rows, strict=True), *([(COMPOSITES, composites)] if composites else [])]
    work = []
    for index, (_, group) in enumerate(groups):
        ordered = sorted(group, key=len)
        work += [(index, ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]
    if not work:
        return {}
    totals = torch.zeros(len(groups), len(_SUMS), dtype=torch.float64, device=device)
    kinds: dict[str, Tensor] = {}
    with progress.task("measuring gates on held-out rows", total=-(-len(work) // runtime.world), unit="batches") as bar:
        for start in range(0, len(work), runtime.world):
            mine = start + runtime.rank
            index, picked = work[min(mine, len(work) - 1)]
            batch = collate(picked, held_out.pad_token, response_only=held_out.response_only).to(device)
            with without_cudnn_attention(), state.label_gates(batch.gate_labels, keep_hits=True) as observed:
                lm, losses = on_model(lambda module, batch=batch: lm_losses(module, batch))  # type: ignore[misc]
            if mine < len(work):
                totals[index] += _sums(lm, observed, batch)
                if index < len(names):
                    for name, value in gate_tallies(observed, batch, losses, names).items():
                        kinds[name] = kinds[name] + value if name in kinds else value
            elif not kinds:
                kinds = {name: value * 0 for name, value in gate_tallies(observed, batch, losses, names).items()}
            bar.update(1)
    totals = runtime.total(totals)
    measured = _named(totals[: len(names)].sum(0))
    for (name, group), values in zip(groups, totals, strict=True):
        if group:
            measured |= {f"{key}/{name}": value for key, value in _named(values).items() if key != "gate_accuracy_all"}
    for name in (name for name in kinds if name.startswith("accuracy/") and name.removeprefix("accuracy/") not in names):
        right, count = runtime.total(kinds[name]).tolist()
        measured[f"gate_{name}"] = right / max(1.0, count)
    return measured


def _sums(lm: Tensor, observed: GateObservations, batch: Batch) -> Tensor:
    labelled = batch.gate_labels.reshape(-1) != IGNORE
    response = batch.response.reshape(-1) & labelled
    later = {path: hits for path, hits in observed.hits.items() if not is_first_layer(path)}
    values = [
        lm,
        (batch.targets != IGNORE).sum(),
        torch.stack(observed.loss_sums).mean(),
        labelled.sum(),
        hit_sum(observed.hits, labelled),
        hit_sum(later or observed.hits, response),
        response.sum(),
    ]
    return torch.stack([value.double() for value in values])


def _named(values: Tensor) -> dict[str, float]:
    total = dict(zip(_SUMS, values.tolist(), strict=True))
    if not total["response_labels"]:
        return {}
    return {
        "gate_accuracy": total["response"] / total["response_labels"],
        "gate_accuracy_all": total["all"] / total["labels"],
        "gate_loss": total["gate"] / total["labels"],
        "lm_loss": total["lm"] / max(1.0, total["targets"]),
    }
