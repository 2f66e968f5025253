"""The balance of the language-model loss between tasks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from meteora_core.checkpoints.native_config import read_config
from meteora_core.training.encoding import TrainRow, collate, row_target_labels
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.loop import Counts
from meteora_core.training.loss import count_targets
from support.tiny_training import gates


def test_tasks_have_the_same_weight_in_the_balanced_loss() -> None:
    """Over the batches of a step, the targets of each task weigh the same together and the mean weight of labelled targets is 1."""
    rows = [
        TrainRow((1, 2, 3, 4), (0,) * 4, 3),  # one target in the response
        TrainRow(tuple(range(12)), (0,) * 5 + (-100,) + (2,) * 6, 6),  # part of a composite: its response belongs to another task than its prompt
        TrainRow(tuple(range(9)), (2,) * 9, 2),
    ]
    for response_only, expected in ((True, {0: 1, 2: 12, -100: 1}), (False, {0: 8, 2: 13, -100: 1})):
        seen = Counter(label for row in rows for label in row_target_labels(row, response_only))
        assert seen == expected
        batches = [collate(rows[:1], 1, response_only=response_only), collate(rows[1:], 1, response_only=response_only)]
        counts = Counts(sum(map(count_targets, batches)), 1, targets_by_label=tuple(seen[task] for task in range(4)))
        objective = GateObjective(50.0, balance="tasks")
        sums: Counter[int] = Counter()
        for batch in batches:
            weights = objective.lm_weights(batch, counts)
            for label in (0, 1, 2, 3, -100):
                sums[label] += float(weights[(batch.gate_labels == label) & (batch.targets != -100)].sum())
        labelled = expected[0] + expected[2]
        assert sums[0] == pytest.approx(labelled / 2) == sums[2]
        assert sums[1] == sums[3] == 0
        assert sums[-100] == 1
        assert GateObjective(50.0).lm_weights(batches[0], counts) is None


def test_the_balance_of_the_loss_changes_adapters_and_nothing_else_is_recorded_without_it(data, adapters, tmp_path) -> None:
    common = {"trainable": "gates+adapters", "loss_on": "response", "max_steps": 4, "composite_rows": 0.5}
    runs = [gates(data, adapters, tmp_path / balance, loss_balance=balance, **common)[1] for balance in ("tokens", "tasks")]
    recorded = [read_config(run.folder)["training"]["inputs"]["settings"] for run in runs]
    assert "loss_balance" not in recorded[0]
    assert recorded[1]["loss_balance"] == "tasks"
    stored = [load_file(run.folder / "meteora.safetensors") for run in runs]
    assert any(not torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
