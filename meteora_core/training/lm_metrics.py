"""The language-model loss, logged per task and measured on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.routing import IGNORE
from meteora_core.training.distributed import SINGLE, OnModel, Runtime
from meteora_core.training.encoding import Batch, collate
from meteora_core.training.gate_metrics import by_task
from meteora_core.training.loss import lm_losses
from meteora_core.training.task_rows import HeldOut


def lm_tallies(batch: Batch, losses: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The language-model loss per task; see :func:`meteora_core.training.gate_metrics.by_task`."""
    return by_task("lm", losses, torch.where(batch.targets.reshape(-1) != IGNORE, batch.gate_labels.reshape(-1), IGNORE), names)


@torch.no_grad()
def measure_lm(
    model: nn.Module,
    held_out: HeldOut,
    *,
    runtime: Runtime = SINGLE,
    on_model: OnModel,
    around: Callable[[Batch], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """The language-model loss on held-out rows.

    Args:
        model: A causal language model, possibly wrapped by PEFT.
        held_out: The rows of each task.
        runtime: The processes; each measures a part of the rows.
        on_model: Function that calls another function on the wrapped model.
        around: Function from a batch to a context in which its forward pass runs.

    Returns:
        ``loss`` over all rows, and ``lm/<task>`` for each of several tasks. Empty when there are no rows.
    """
    names, size = held_out.names, held_out.batch_size
    ordered = sorted((row for task_rows in held_out.rows for row in task_rows), key=len)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    model.eval()
    device = runtime.device or next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    for start in range(0, len(parts), runtime.world):
        mine = start + runtime.rank
        batch = collate(parts[min(mine, len(parts) - 1)], held_out.pad_token, response_only=held_out.response_only).to(device)
        with around(batch):
            _, losses = on_model(lambda module, batch=batch: lm_losses(module, batch))  # type: ignore[misc]
        weight = 1.0 if mine < len(parts) else 0.0
        for name, value in lm_tallies(batch, losses, names).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + weight * value
    totals = {name: runtime.total(value).tolist() for name, value in sums.items()}
    counted = sum(count for _, count in totals.values())
    if not counted:
        return {}
    measured = {name: total / count for name, (total, count) in totals.items() if count} if len(names) > 1 else {}
    return {"loss": sum(total for total, _ in totals.values()) / counted, **measured}
