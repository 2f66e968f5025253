"""Token sequences, batches and the plan of batches."""

from __future__ import annotations

import pytest
import torch

from meteora_core.data.rows import Row
from meteora_core.errors import DataError
from meteora_core.training.batch_plan import plan_batches
from meteora_core.training.encoding import collate, encode_rows, leading_special_tokens
from support.tiny_training import letters


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_rows_end_with_one_eos_and_begin_with_the_tokenizers_bos(bos, eos) -> None:
    tokenizer = letters(bos=bos, eos=eos)
    row = encode_rows([Row("ab\n", "cde")], tokenizer, 2, 100).rows[0]
    text = [ord(letter) - 30 for letter in "ab"] + [97] + [ord(letter) - 30 for letter in "cde"]
    assert list(row.tokens) == [0] * bos + text + [1]
    assert row.response_start == bos + 3
    assert row.gate_labels == (2,) * len(row.tokens)
    assert leading_special_tokens(tokenizer) == bos


def test_long_rows_lose_the_start_of_the_prompt_and_keep_bos_and_response() -> None:
    encoded = encode_rows([Row("abcdefgh", "XYZ"), Row("a", "b")], letters(bos=True), 0, 8)
    assert encoded.cut == 1
    row = encoded.rows[0]
    assert len(row) == 8
    assert row.tokens[0] == 0
    assert list(row.tokens[row.response_start :]) == [ord(letter) - 30 for letter in "XYZ"] + [1]
    assert list(row.tokens[1 : row.response_start]) == [ord(letter) - 30 for letter in "fgh"]


def test_a_response_longer_than_the_limit_is_cut_at_its_end() -> None:
    row = encode_rows([Row("ab", "ABCDEFGHIJ")], letters(), 0, 5).rows[0]
    assert list(row.tokens) == [ord(letter) - 30 for letter in "ABCDE"]
    assert row.response_start == 0


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no training rows"):
        encode_rows([], letters(), 0, 8)


def test_targets_are_shifted_and_padding_is_ignored() -> None:
    rows = encode_rows([Row("ab", "c"), Row("a", "b")], letters(), 1, 100).rows
    batch = collate(rows, 1, multiple=1)
    a, b, c = (ord(letter) - 30 for letter in "abc")
    assert batch.input_ids.tolist() == [[a, b, c, 1], [a, b, 1, 1]]
    assert batch.targets.tolist() == [[b, c, 1, -100], [b, 1, -100, -100]]
    assert batch.gate_labels.tolist() == [[1, 1, 1, 1], [1, 1, 1, -100]]
    assert batch.response.tolist() == [[False, False, True, True], [False, True, True, False]]
    assert batch.tokens == 7
    assert collate(rows, 1, multiple=1, response_only=True).targets.tolist() == [[-100, c, 1, -100], [b, 1, -100, -100]]
    assert collate(rows, 1).input_ids.shape == (2, 8)


def test_the_plan_is_fixed_by_the_seed_and_balances_tokens() -> None:
    lengths = [[10] * 50, [40] * 20, [20, 30] * 4]
    plan = plan_batches(lengths, 100, 6, 3)
    assert plan == plan_batches(lengths, 100, 6, 3)
    assert plan != plan_batches(lengths, 100, 6, 4)
    assert plan[:40] != plan[40:80]
    assert all(len(batch) == 6 for batch in plan)
    spent = [0, 0, 0]
    for batch in plan:
        for task, row in batch:
            spent[task] += lengths[task][row]
    assert max(spent) - min(spent) <= 80
    seen = [row for batch in plan for task, row in batch if task == 1]
    assert sorted(seen[:20]) != list(range(20)) or len(set(seen)) == 20
    assert {row for batch in plan for task, row in batch if task == 2} == set(range(8))


def test_a_shorter_plan_is_not_the_start_of_a_longer_one_by_chance_only() -> None:
    """Whole buckets are planned together, so runs with the same number of steps get the same batches."""
    lengths = [[5, 6, 7, 8] * 10]
    assert torch.equal(torch.tensor(plan_batches(lengths, 16, 2, 0)), torch.tensor(plan_batches(lengths, 16, 2, 0)))


def test_rows_with_half_a_character_are_refused() -> None:
    with pytest.raises(DataError, match=r"half of a character .a lone surrogate., which no tokenizer takes: 'ab.ud83dc'"):
        encode_rows([Row("x", "y"), Row("ab\ud83d", "c")], letters(), 0, 100)
