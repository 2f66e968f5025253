"""Composites: the authors' pairing, the format, and the solved examples."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data.build import BuildRequest, build_task, build_tasks
from meteora_core.data.catalog import list_tasks, verify
from meteora_core.data.composite import (
    SEPARATOR,
    CompositeRequest,
    build_composite,
    choose_members,
    compose,
    draw_examples,
    lead_text,
    plan_composite,
    split_response,
)
from meteora_core.data.manifest import read_manifest, write_manifest
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import get_task
from meteora_core.data.userdata import add_task, own_task, register_built, task_in
from meteora_core.data.writer import prompt_key
from meteora_core.errors import DataError, UsageError

THREE = ("logical_deduction", "question_selection", "strategyqa")


@pytest.fixture
def data(repository: Path, tmp_path: Path) -> Path:
    build_tasks(THREE, tmp_path / "data", BuildRequest(raw_dir=repository))
    return tmp_path / "data"


def test_compose() -> None:
    row = compose([Row("[INST] a [/INST]\n", "x"), Row("[INST] b [/INST]\n", "y\nz")], "lead\n")
    assert row.prompt == "lead\n[INST] a [/INST]\n\n\n[INST] b [/INST]\n\n"
    assert row.response == "x@@@@\ny\nz"
    assert split_response(row.response) == ["x", "y\nz"]


def test_lead_text() -> None:
    text = lead_text([[Row("[INST] a [/INST]\n", "x"), Row("[INST] b [/INST]\n", "y ")]])
    assert text.startswith("\nExample 1:\n\n[INST] a [/INST]\n\n[INST] b [/INST]\n\n1. x\n2. y\n\n\n")
    assert text.endswith(":\n\n")
    assert "xample" not in lead_text([])


def test_rows_are_paired_as_the_authors_do(data: Path) -> None:
    manifest = build_composite(data, CompositeRequest(n=3, num_samples=20))
    assert manifest.members == THREE
    rows = read_rows(data, "composite_3", "test")
    random.seed(47)
    shuffled = []
    for member in THREE:
        lines = (data / member / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        random.shuffle(lines)
        shuffled.append(lines[:20])
    import json

    for row, lines in zip(rows, zip(*shuffled, strict=True), strict=True):
        parts = [json.loads(line) for line in lines]
        assert row.prompt.endswith(":\n\n" + "".join(part["prompt"] + "\n\n" for part in parts)[:-1])
        assert row.response == "@@@@\n".join(part["response"] for part in parts)


def test_solved_examples_come_from_train(data: Path) -> None:
    manifest = build_composite(data, CompositeRequest(n=3))
    assert manifest.rows == {"test": 20}
    assert len(manifest.examples) == 2
    rows = read_rows(data, "composite_3", "test")
    lead = rows[0].prompt.split("answer the questions below:\n\n")[0]
    assert all(row.prompt.startswith(lead) for row in rows)
    for place, member in enumerate(THREE):
        train = read_rows(data, member, "train")
        tested = {row.prompt for row in read_rows(data, member, "test")}
        for example in manifest.examples:
            solved = train[example[place]]
            assert solved.prompt not in tested
            assert solved.prompt in lead
            assert f"\n{place + 1}. {solved.response}\n" in lead


def test_seed_and_number_of_examples(data: Path) -> None:
    first = build_composite(data, CompositeRequest(n=3))
    again = build_composite(data, CompositeRequest(n=3))
    other = build_composite(data, CompositeRequest(n=3, seed=1))
    none = build_composite(data, CompositeRequest(n=3, examples=0))
    assert first == again
    assert first.files != other.files
    assert none.examples == ()
    assert read_rows(data, "composite_3", "test")[0].prompt.count("[INST]") == 3


def test_what_can_be_drawn() -> None:
    train = [Row(f"question {i}", f"answer {i}") for i in range(300)]
    train[3] = Row("q", "two\nlines")
    train[4] = Row("q", "  ")
    train[5] = Row("x", "y")
    train[6] = Row("long " * 500, "y")
    tested = {prompt_key(train[5])}
    for seed in range(200):
        drawn = {number for example in draw_examples([train], [tested], 2, seed).numbers for number in example}
        assert len(drawn) == 2
        assert not drawn & {3, 4, 5, 6}
    with pytest.raises(ValueError, match="0:only 1 train rows"):
        draw_examples([train[:1]], [set()], 2, 0)


def test_any_list_of_tasks(data: Path) -> None:
    manifest = build_composite(data, CompositeRequest(tasks=["strategyqa", "logical_deduction"]))
    assert manifest.task == "composite_2_custom"
    assert build_composite(data, CompositeRequest(tasks=["strategyqa", "logical_deduction"], name="pair")).task == "pair"
    register_built(data)
    assert get_task("pair").members == ("strategyqa", "logical_deduction")
    assert get_task("pair").routing_temperature == 15.0
    assert get_task("pair").metric == "composite"
    assert task_in(data, "composite_2_custom").members == ("strategyqa", "logical_deduction")


def test_members_that_n_and_tasks_choose() -> None:
    assert choose_members(3, None) == THREE
    assert choose_members(None, ["a", "b"]) == ("a", "b")
    assert choose_members(2, ["a", "b", "c"]) == ("a", "b")
    for n, tasks, message in (
        (None, None, "needs its size"),
        (4, ["a", "b", "c"], "only 3 tasks are named"),
        (None, ["a"], "at least 2"),
        (1, ["a", "b"], "at least 2"),
        (None, ["a", "b", "a"], "named twice"),
        (29, None, "2 to 28"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_members(n, tasks)


def test_problems(data: Path, tmp_path: Path, write_lines: Any) -> None:
    with pytest.raises(DataError, match="strategyqa has only 20 test rows") as caught:
        build_composite(data, CompositeRequest(n=3, num_samples=21))
    assert "at most 20" in (caught.value.hint or "")
    with pytest.raises(DataError, match="no test rows of gsm8k") as caught:
        build_composite(data, CompositeRequest(tasks=["strategyqa", "gsm8k"]))
    assert "meteora data build --task gsm8k" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="unknown task"):
        build_composite(data, CompositeRequest(tasks=["strategyqa", "nothing"]))
    with pytest.raises(UsageError, match="num_samples must be at least 1"):
        build_composite(data, CompositeRequest(n=3, num_samples=0))
    with pytest.raises(UsageError, match="cannot name"):
        build_composite(data, CompositeRequest(n=3, name="../up"))
    with pytest.raises(UsageError, match="built-in"):
        build_composite(data, CompositeRequest(n=3, name="gsm8k"))
    build_composite(data, CompositeRequest(n=3))
    (data / "composite_3").rename(data / "pair")
    with pytest.raises(DataError, match="holds the dataset of composite_3"):
        build_composite(data, CompositeRequest(n=3, name="pair"))
    with pytest.raises(UsageError, match="is a composite itself"):
        build_composite(data, CompositeRequest(tasks=["strategyqa", "composite_3"]))
    write_lines(tmp_path / "raw" / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": "a@@@@\nb"} for i in range(20)])
    build_task("gsm8k", data, raw_dir=tmp_path / "raw")
    with pytest.raises(DataError, match="separates the answers"):
        build_composite(data, CompositeRequest(tasks=["strategyqa", "gsm8k"]))


def test_verify_notices_members_that_were_built_anew(data: Path, repository: Path) -> None:
    build_composite(data, CompositeRequest(n=3))
    assert [report.notes for report in verify(data, ["composite_3"])] == [()]
    build_task("strategyqa", data, raw_dir=repository, max_test=10)
    report = verify(data, ["composite_3"])[0]
    assert report.ok
    assert report.notes == ("strategyqa was built again since, or is missing",)


def test_plan_writes_nothing(data: Path) -> None:
    plan = plan_composite(data, CompositeRequest(n=3))
    assert plan.count == 20
    assert not (data / "composite_3").exists()
    assert [row.response.count(SEPARATOR) for row in plan.rows()] == [2] * 20


def test_finished_composite_is_evaluated_as_it_is(tmp_path: Path, write_lines: Any) -> None:
    write_lines(tmp_path / "raw" / "composite_10" / "test.jsonl", [{"prompt": "\nExample 1:\n", "response": "@@@@\n".join("abcdefghij")}])
    build_task("composite_10", tmp_path / "out", source="local", raw_dir=tmp_path / "raw")
    row = read_rows(tmp_path / "out", "composite_10", "test")[0]
    assert (row.prompt, len(split_response(row.response))) == ("\nExample 1:\n", 10)
    manifest = read_manifest(tmp_path / "out" / "composite_10")
    assert manifest is not None
    assert manifest.members == get_task("composite_10").members


def test_names_that_would_replace_something_else_are_refused(data: Path, write_lines: Any) -> None:
    for name in ("one", "two", "three"):
        add_task(own_task(name, train=write_lines(data.parent / f"{name}.jsonl", [{"prompt": f"{name} {i}", "response": "r"} for i in range(60)])), data)
    before = read_manifest(data / "one")
    with pytest.raises(UsageError, match="its member 'one'"):
        build_composite(data, CompositeRequest(tasks=["one", "two"], name="one"))
    with pytest.raises(DataError, match="not a composite"):
        build_composite(data, CompositeRequest(tasks=["two", "three"], name="one"))
    assert read_manifest(data / "one") == before
    assert task_in(data, "one").metric == "exact"
    build_composite(data, CompositeRequest(tasks=["one", "two"], name="pair"))
    assert build_composite(data, CompositeRequest(tasks=["two", "three"], name="pair")).members == ("two", "three")
    pair = read_manifest(data / "pair")
    with pytest.raises(DataError, match="pair holds a composite"):
        add_task(own_task("pair", train=data.parent / "one.jsonl"), data)
    assert read_manifest(data / "pair") == pair


def test_the_name_of_a_built_in_composite_belongs_to_its_members(data: Path) -> None:
    for name in ("composite_3", "composite_5", "composite_10"):
        with pytest.raises(UsageError, match="is a built-in composite of logical_deduction, question_selection"):
            build_composite(data, CompositeRequest(tasks=["strategyqa", "logical_deduction"], name=name))
    assert build_composite(data, CompositeRequest(n=3, name="composite_3")).members == THREE


@pytest.mark.parametrize("members", [("pair", "strategyqa"), ("other", "strategyqa")])
def test_a_cycle_of_members_is_a_broken_dataset(data: Path, members: tuple[str, ...]) -> None:
    for name in ("pair", "other"):
        manifest = build_composite(data, CompositeRequest(tasks=["strategyqa", "logical_deduction"], name=name))
        write_manifest(data / name, replace(manifest, members=members if name == "pair" else ("pair", "strategyqa")))
    assert [task.name for task in register_built(data)] == []
    for name in ("pair", "other"):
        with pytest.raises(DataError, match="is broken: its manifest names"):
            task_in(data, name)
    report = verify(data, ["pair"])[0]
    assert report.problems == (f"{data / 'pair'} names {members[0]} as a member, which is a composite",)
    assert {status.name: status.metric for status in list_tasks(data)}["pair"] == "unknown"
    with pytest.raises(DataError, match="is broken"):
        build_composite(data, CompositeRequest(tasks=["strategyqa", "pair"], name="third"))
    assert build_composite(data, CompositeRequest(tasks=["strategyqa", "logical_deduction"], name="pair")).members == ("strategyqa", "logical_deduction")
