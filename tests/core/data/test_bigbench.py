"""BIG-bench's formatting and split, against examples computed by hand and against NumPy and random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meteora_core.data.bigbench import Example, Style, format_example, iter_split, permutation, split_order, task_files, to_row
from meteora_core.data.rows import Row
from meteora_core.data.tasks import TASKS
from meteora_core.errors import DataError

DEFAULT = Style("", "\nQ: ", "\nA: ", "\n  choice: ", True)


def test_defaults() -> None:
    assert format_example({"input": "Why?", "target": "So. "}, DEFAULT) == Example("Q: Why?\nA:", "So.", ())
    with_prefix = Style("Read this.\n", "\nIn: ", "\nOut: ", "\n- ", False)
    assert format_example({"input": "Why?", "target": ["a", "b"]}, with_prefix).inputs == "Read this.\n\nIn: Why?\nOut:"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 100])
def test_choice_order_is_numpys(n: int) -> None:
    choices = [f"choice {chr(0x394 + i)}" for i in random.Random(n).sample(range(n), n)]
    shown = format_example({"input": "x", "target_scores": {choice: int(i == 0) for i, choice in enumerate(choices)}}, DEFAULT).inputs
    wanted = [str(choice) for choice in np.random.RandomState(42).permutation(sorted(choices))]
    assert shown == "Q: x" + "".join(f"\n  choice: {choice}" for choice in wanted) + "\nA:"
    assert sorted(permutation(n)) == list(range(n))


@pytest.mark.parametrize(
    ("example", "target"),
    [
        ({"input": "x", "target": ["first", "second"]}, "first"),
        ({"input": "x", "target": 4}, "4"),
        ({"input": "x", "target": [2.5, "x"]}, "2.5"),
        ({"input": "x", "target_scores": {"b": 0.5, "a": 0.5, "c": 0}}, "b"),
        ({"input": "x", "target_scores": {"a": -2, "b": -1}}, "b"),
        ({"input": "x", "target_scores": {"only": 1}}, "only"),
        ({"input": "x", "target": "t", "target_scores": {"a": 1, "b": 0}}, "t"),
    ],
)
def test_targets(example: dict[str, Any], target: str) -> None:
    assert format_example(example, DEFAULT).target == target


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("text", "not a JSON object"),
        ({"target": "x"}, "no field 'input'"),
        ({"input": "x"}, "neither 'target' nor 'target_scores'"),
        ({"input": "x", "target": []}, "empty list"),
        ({"input": ["x"], "target": "y"}, "'input' is not a text"),
        ({"input": "x", "target": True}, "'target' is not a text"),
        ({"input": "x", "target_scores": {}}, "not an object with choices"),
        ({"input": "x", "target_scores": {"a": 1, "b": 1}}, "no choice scores higher"),
        ({"input": "x", "target_scores": {"a": 0}}, "no choice scores higher"),
        ({"input": "x", "target_scores": {"a": "1"}}, "not a number"),
    ],
)
def test_broken_examples(example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_example(example, DEFAULT)


def test_choices_that_meteora_appends() -> None:
    example = Example("Who is first?", "A.", ("B.", "A."))
    assert to_row(TASKS["logical_deduction"], example) == Row("[INST] Who is first? Which choice is correct?\nchoice: B.\nchoice: A.\n [/INST]\n", "A.")
    assert to_row(TASKS["unit_conversion"], example).prompt == "[INST] Who is first?\nchoice: B.\nchoice: A.\n [/INST]\n"
    assert to_row(TASKS["unit_conversion"], Example("How long?", "3 m", ())).prompt == "[INST] How long?\n [/INST]\n"
    assert to_row(TASKS["winowhy"], example).prompt == "[INST] Who is first? [/INST]\n"


@pytest.mark.parametrize(("n", "held_out"), [(17, 16), (79, 16), (80, 16), (85, 17), (1582, 316), (9000, 1800)])
def test_split_is_pythons_shuffle(n: int, held_out: int) -> None:
    rows = [f"row {i}" for i in range(n)]
    random.seed(42)
    random.shuffle(rows)
    train, test = split_order(n)
    assert [f"row {i}" for i in train + test] == rows
    assert len(test) == held_out


def test_too_few_to_split() -> None:
    with pytest.raises(ValueError, match="too few"):
        split_order(16)


def test_sub_tasks_are_split_apart(repository: Path) -> None:
    task = TASKS["logical_deduction"]
    files = task_files(repository / "bigbench" / "benchmark_tasks" / task.name)
    assert [index.path.parent.name for index in files] == ["five_objects", "three_objects"]
    train, test = list(iter_split(task, files, "train")), list(iter_split(task, files, "test"))
    assert (len(train), len(test)) == (96 + 72, 24 + 18)
    assert all("five_objects" in row.prompt for row in test[:24])
    assert all("three_objects" in row.prompt for row in test[24:])
    number = split_order(120)[1][0]
    assert test[0].prompt == (
        f"[INST] Objects in order.\n\n\nfive_objects {number}: who is first? Which choice is correct?\nchoice: The cat.\nchoice: The ant.\n [/INST]\n"
    )
    assert test[0].response == ("The cat." if number % 2 == 0 else "The ant.")


def test_duplicates_go_before_the_split(repository: Path) -> None:
    task = TASKS["strategyqa"]
    files = task_files(repository / "bigbench" / "benchmark_tasks" / task.name)
    assert (files[0].total, len(files[0])) == (101, 100)
    rows = [*iter_split(task, files, "train"), *iter_split(task, files, "test")]
    assert len({row.prompt for row in rows}) == len(rows) == 100
    assert {row.response for row in rows} == {"Yes. It is.", "No. It is odd."}


def test_broken_example_is_placed(tmp_path: Path, write_json: Any) -> None:
    examples: list[Any] = [{"input": str(i), "target": "x"} for i in range(40)]
    examples[7] = {"input": "no target"}
    path = write_json(tmp_path / "winowhy" / "task.json", {"examples": examples})
    line = path.read_text().splitlines().index('   "input": "no target"')
    files = task_files(path.parent)
    with pytest.raises(DataError, match=rf"task\.json:{line}:3: an example has neither"):
        list(iter_split(TASKS["winowhy"], files, "train")) + list(iter_split(TASKS["winowhy"], files, "test"))


def test_broken_layouts(tmp_path: Path, write_json: Any) -> None:
    write_json(tmp_path / "a" / "task.json", {"name": "a"})
    with pytest.raises(DataError, match="neither 'examples' nor folders of sub-tasks"):
        task_files(tmp_path / "a")
    write_json(tmp_path / "a" / "part" / "task.json", {"name": "part"})
    with pytest.raises(DataError, match="no field 'examples'"):
        task_files(tmp_path / "a")
    write_json(tmp_path / "b" / "task.json", {"examples": [{"input": str(i), "target": "x"} for i in range(20)], "task_prefix": 3})
    with pytest.raises(DataError, match="'task_prefix' is not a text"):
        list(iter_split(TASKS["winowhy"], task_files(tmp_path / "b"), "train"))
