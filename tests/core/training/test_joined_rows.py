"""Joined rows: complete rows of different tasks in one sequence, without a mask between them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from meteora_core.data.rows import Row
from meteora_core.errors import UsageError
from meteora_core.settings import GateTrainSettings
from meteora_core.training.encoding import (
    TrainRow,
    collate,
    collate_packed,
    count_row_answers,
    count_row_labels,
    count_row_targets,
    encode_rows,
    join_rows,
    row_target_labels,
)
from meteora_core.training.gate_rows import counts_of_mixed, name_of_mixed
from meteora_core.training.input_sums import token_weights
from meteora_core.training.joined_rows import make_joined
from support.tiny_training import gates, letters

FIRST, SECOND = TrainRow((10, 11, 12, 1), (0, 0, 0, 0), 2), TrainRow((20, 21, 22, 23, 1), (1, 1, 1, 1, 1), 3)


def test_a_joined_row_is_its_rows_one_after_another_and_no_target_crosses_them() -> None:
    row = join_rows([FIRST, SECOND])
    assert (row.tokens, row.gate_labels) == (FIRST.tokens + SECOND.tokens, FIRST.gate_labels + SECOND.gate_labels)
    batch = collate([row], 0, multiple=1)
    assert batch.position_ids is None  # so that each row sees those before it
    assert batch.targets.tolist() == [[11, 12, 1, -100, 21, 22, 23, 1, -100]]
    assert batch.response.tolist() == [[False, False, True, True, False, False, False, True, True]]
    assert collate([row], 0, multiple=1, response_only=True).targets.tolist() == [[-100, 12, 1, -100, -100, -100, 23, 1, -100]]


@pytest.mark.parametrize("response_only", [False, True])
def test_counts_of_a_joined_row_are_those_of_its_batch(response_only) -> None:
    row = join_rows([FIRST, SECOND])
    batch = collate([row], 0, response_only=response_only)
    targets = batch.targets != -100
    assert count_row_targets(row, response_only) == int(targets.sum())
    assert row_target_labels(row, response_only) == tuple(batch.gate_labels[targets].tolist())
    assert count_row_answers(row) == int((batch.response & (batch.gate_labels != -100)).sum()) == 4
    assert count_row_labels(row) == len(row) == 9


def test_weights_of_the_closed_form_are_those_of_the_rows_alone() -> None:
    joined, alone = (token_weights(rows, 2, 0.8) for rows in ([join_rows([FIRST, SECOND])], [FIRST, SECOND]))
    assert torch.equal(joined, alone)


def test_packed_sequences_keep_a_joined_row_whole() -> None:
    batch = collate_packed([[FIRST, join_rows([FIRST, SECOND])]], 0, multiple=1)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[*range(4), *range(9)]]
    assert batch.targets.tolist() == [[11, 12, 1, -100, 11, 12, 1, -100, 21, 22, 23, 1, -100]]


def rows_of(count: int) -> list[Sequence[TrainRow]]:
    texts = {name: [Row(f"[INST] {name}{'x' * i} [/INST]\n", f"{name}{i}") for i in range(20)] for name in "abcdef"[:count]}
    return [encode_rows(rows, letters(), task, 400).rows for task, rows in enumerate(texts.values())]


def test_joined_rows_are_complete_rows_of_different_tasks_and_depend_on_the_seed_alone() -> None:
    rows = rows_of(5)
    made = make_joined(rows, count=80, largest=4, max_length=400, seed=1)
    assert made == make_joined(rows, count=80, largest=4, max_length=400, seed=1) != make_joined(rows, count=80, largest=4, max_length=400, seed=2)
    assert {len(row.joined) for row in made} == {2, 3, 4}
    orders = set()
    for row in made:
        tasks = [part.gate_labels[0] for part in row.parts]
        assert len(set(tasks)) == len(tasks)
        assert all(part in rows[task] for task, part in zip(tasks, row.parts, strict=True))
        orders.add(tuple(tasks[:2]))
    assert len(orders) > 15
    assert {len(row.joined) for row in make_joined(rows[:2], count=20, largest=4, max_length=400, seed=1)} == {2}


def test_rows_that_do_not_fit_are_left_out() -> None:
    rows = rows_of(5)
    assert all(len(row.joined) > 1 and len(row) <= 60 for row in make_joined(rows, count=40, largest=5, max_length=60, seed=0))
    alone = make_joined(rows, count=10, largest=2, max_length=34, seed=0)
    assert {len(row.joined) for row in alone} == {1}
    with pytest.raises(UsageError, match="at least two adapters"):
        make_joined(rows[:1], count=1, largest=2, max_length=400, seed=0)


def test_composites_and_joined_rows_are_made_in_proportion_to_their_shares() -> None:
    assert counts_of_mixed(GateTrainSettings(), 1000) == (0, 0)
    assert counts_of_mixed(GateTrainSettings(joined_rows=0.5), 1000) == (0, 532)
    assert counts_of_mixed(GateTrainSettings(joined_rows=0.25, composite_rows=0.5), 1000) == (543, 272)
    assert counts_of_mixed(GateTrainSettings(joined_rows=0.25, composite_rows=0.75), 10**6) == (3072, 1024)
    named = [name_of_mixed(GateTrainSettings(composite_rows=first, joined_rows=second)) for first, second in ((0.5, 0), (0, 0.5), (0.5, 0.5))]
    assert named == ["composites", "joined rows", "composites and joined rows"]
    with pytest.raises(ValueError, match="more than all rows"):
        GateTrainSettings(joined_rows=0.6, composite_rows=0.5)


def test_gates_train_on_joined_rows_from_the_closed_form(data, adapters, tmp_path) -> None:
    _, done = gates(data, adapters, tmp_path / "m", max_steps=10, init="ridge", ridge_tokens=800, joined_rows=0.5, joined_max=2, max_length=120)
    assert done.parts["accuracy"] > 0.5
    assert done.sampled["joined rows"]["rows"] > 32
    assert "composites" not in done.sampled
    _, other = gates(data, adapters, tmp_path / "other", max_steps=10, init="ridge", ridge_tokens=800, max_length=120)
    assert "joined rows" not in other.sampled
