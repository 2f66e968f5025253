"""Composite training rows: the data builder's format, and gate labels by segment."""

from __future__ import annotations

from collections import Counter

import pytest

from meteora_core.data.composite import compose, lead_text, numbered
from meteora_core.data.rows import Row
from meteora_core.errors import UsageError
from meteora_core.training.batch_plan import RowMix, plan_batches
from meteora_core.training.composites import LISTS, ListRows, RowsWithLists, composite_text, list_texts, make_composites, with_lists
from meteora_core.training.encoding import encode_labelled, encode_rows, row_lengths
from support.tiny_training import letters

A, B, C = Row("[INST] one [/INST]\n", "first"), Row("[INST] two [/INST]\n", "x\ny"), Row("[INST] 1. one [/INST]\n", "1. third")


def pieces(text, task):
    whole = text.prompt + text.response
    return [whole[begin:end] for begin, end, wanted in text.spans if wanted == task]


@pytest.mark.parametrize("examples", [[], [[C, A]], [[C, A], [A, C]]])
def test_a_composite_has_the_builders_format_and_every_part_its_own_task(examples) -> None:
    text = composite_text([(5, A), (3, B)], examples)
    lead = lead_text(examples)
    assert text.prompt == compose([A, B], lead).prompt
    assert text.response + "\n" == numbered(["first", "x\ny"])
    assert pieces(text, 5) == [part for rows in examples for part in (rows[0].prompt, f"1. {rows[0].response}\n")] + [A.prompt, "1. first\n"]
    assert pieces(text, 3) == [part for rows in examples for part in (rows[1].prompt, f"2. {rows[1].response}\n")] + [B.prompt, "2. x\ny"]
    assert list(text.spans) == sorted(text.spans)
    assert all(end <= begin for (_, end, _), (begin, _, _) in zip(text.spans, text.spans[1:], strict=False))


def test_tokens_have_the_labels_of_their_characters_and_connecting_text_has_none() -> None:
    text = composite_text([(1, A), (0, B)])
    row = encode_labelled([text], letters(bos=True), 1000).rows[0]
    whole = text.prompt + text.response
    lead = lead_text([])
    labels = row.gate_labels[1:-1]
    assert row.gate_labels[0] == -100
    assert set(labels[: len(lead)]) == {-100}
    assert set(labels[len(lead) : len(lead) + len(A.prompt)]) == {1}
    assert set(labels[len(lead) + len(A.prompt) : whole.index(B.prompt)]) == {-100}
    answer = whole.index("1. first\n", len(text.prompt))
    assert set(labels[answer : answer + 9]) == {1}
    assert set(labels[answer + 9 :]) == {0}
    assert row.gate_labels[-1] == 0
    assert row.response_start == 1 + len(text.prompt)
    cut = encode_labelled([text], letters(bos=True), 60)
    assert cut.cut == 1
    assert cut.rows[0].gate_labels == (-100, *row.gate_labels[-59:])


def test_composites_depend_on_the_seed_alone_fit_and_vary_in_size() -> None:
    rows = [[Row(f"[INST] {name}{i} [/INST]\n", f"{name}{i}") for i in range(60)] for name in "abcd"]
    made = make_composites(rows, letters(), count=60, largest=3, max_length=400, seed=1)
    assert made.rows == make_composites(rows, letters(), count=60, largest=3, max_length=400, seed=1).rows
    assert made.rows != make_composites(rows, letters(), count=60, largest=3, max_length=400, seed=2).rows
    assert made.cut == 0
    assert {len(set(row.gate_labels) - {-100}) for row in made.rows} == {2, 3}
    texts = ["".join(chr(token + 30) if token != 97 else "\n" for token in row.tokens[:-1]) for row in made.rows]
    solved = sum(text.startswith("\nExample 1:") for text in texts)
    assert 15 < solved < 45
    assert all(text.startswith(("\nExample 1:", "\nAnswer each of the questions below")) for text in texts)
    tight = make_composites(rows, letters(), count=20, largest=4, max_length=160, seed=1)
    assert all(len(row) <= 160 for row in tight.rows)
    with pytest.raises(UsageError, match="at least two adapters"):
        make_composites(rows[:1], letters(), count=1, largest=3, max_length=100, seed=0)


def test_composites_of_tasks_with_long_questions_have_many_questions_too() -> None:
    """Four questions of average length do not fit, and nine of the shortest sixteenth do."""
    rows = [[Row("[INST] " + "x" * (20 + 2 * i) + " [/INST]\n", "yes") for i in range(320)] for _ in range(9)]
    made = make_composites(rows, letters(), count=160, largest=9, max_length=1200, seed=3)
    assert made.cut == 0
    sizes = Counter(len(set(row.gate_labels) - {-100}) for row in made.rows)
    assert set(sizes) == set(range(2, 10))
    assert min(sizes.values()) > 160 / 8 / 3


def test_the_plan_has_the_requested_share_of_composites() -> None:
    lengths = [[10] * 30, [20] * 30]
    plan = plan_batches(lengths, 40, 5, 0, RowMix([50] * 7, 0.3))
    picked = [pick for batch in plan for pick in batch if pick[0] == 2]
    assert len(picked) == 60
    assert {row for _, row in picked} == set(range(7))
    assert plan_batches(lengths, 10, 5, 0, RowMix([50], 0.0)) == plan_batches(lengths, 10, 5, 0)


def questions(count: int) -> list[Row]:
    return [Row(f"[INST] number {i}? [/INST]\n", f"it is {i}") for i in range(count)]


def test_a_list_asks_different_questions_of_one_task_in_the_composites_format() -> None:
    rows = questions(60)
    texts = list_texts(rows, [30] * 60, 3, ListRows(0.5, 5, 10_000, seed=1))
    assert len(texts) == 60
    sizes = set()
    for text in texts:
        asked = [row for row in rows if text.prompt.count(row.prompt) and f". {row.response}\n" in text.response + "\n"]
        in_order = sorted(asked, key=lambda row: text.prompt.rindex(row.prompt))
        assert text.response + "\n" == numbered([row.response for row in in_order])
        assert text.prompt.startswith(("\nExample 1:", "\nAnswer each of the questions below"))
        assert {label for _, _, label in text.spans} == {3}
        sizes.add(len(asked))
    assert sizes == {2, 3, 4, 5}
    assert texts == list_texts(rows, [30] * 60, 3, ListRows(0.5, 5, 10_000, seed=1)) != list_texts(rows, [30] * 60, 3, ListRows(0.5, 5, 10_000, seed=2))
    with pytest.raises(UsageError, match="two train rows"):
        list_texts(rows[:1], [30], 0, ListRows(0.5, 5, 100, seed=0))


def test_lists_fit_into_the_longest_row_where_short_rows_do() -> None:
    rows = questions(40) + [Row("[INST] " + "long " * 60 + f"{i} [/INST]\n", "no") for i in range(20)]
    singles = encode_rows(rows, letters(), 0, 300)
    both = with_lists(singles, rows, letters(), 0, ListRows(0.5, 9, 300, seed=0))
    assert singles.cut == 20
    assert both.cut - singles.cut < 15  # lists that are a little longer than estimated, because each letter is a token here
    assert all(max(row.gate_labels) == 0 and len(row) <= 300 for row in both.rows)
    assert all(row.response_start > 100 for row in both.rows[60:])
    ended = with_lists(singles, rows, letters(), 0, ListRows(0.5, 9, 300, seed=0), end=42)
    assert {row.tokens[-1] for row in ended.rows[60:]} == {42}
    assert {row.tokens[-1] for row in both.rows[60:]} == {1}


def test_a_task_of_long_questions_has_lists_of_many_questions_too() -> None:
    """Three questions of average length do not fit, and nine of the shortest sixteenth do."""
    rows = [Row("[INST] " + "x" * (20 + 2 * i) + " [/INST]\n", "yes") for i in range(800)]
    lengths = [len(row.prompt) + len(row.response) + 1 for row in rows]
    lists = ListRows(0.5, 9, 1700, seed=3)
    assert 3 * sum(lengths) / len(lengths) > lists.max_length
    sizes = Counter(sum(begin >= len(text.prompt) for begin, _, _ in text.spans) for text in list_texts(rows, lengths, 0, lists))
    assert set(sizes) == set(range(2, 10))
    assert min(sizes.values()) > LISTS / 8 / 2


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_of_lists_is_that_of_all_rows_and_lists_are_repeated(share) -> None:
    rows = questions(100)
    singles = encode_rows(rows, letters(), 2, 400)
    both = with_lists(singles, rows, letters(), 2, ListRows(share, 3, 400, seed=0)).rows
    assert isinstance(both, RowsWithLists)
    assert both[:100] == singles.rows
    assert (len(both) - 100) / len(both) == pytest.approx(share, abs=0.01)
    assert len({row.tokens for row in both[100:]}) == min(LISTS, len(both) - 100)
    assert row_lengths(both) == [len(row) for row in both]
    assert both[-1] == both[len(both) - 1]
    with pytest.raises(IndexError):
        both[len(both)]
    assert with_lists(singles, rows, letters(), 2, ListRows(0.001, 3, 400, seed=0)) is singles
