"""Small tasks in the schemas of the real sources, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import restored_tasks


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast tests never see the user's cache; slow tests may use the archive in it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("METEORA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def known_tasks() -> Any:
    """Forget the tasks that a test registers."""
    with restored_tasks():
        yield


@pytest.fixture
def write_json() -> Callable[[Path, Any], Path]:
    def write(path: Path, value: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_lines() -> Callable[[Path, list[Any]], Path]:
    def write(path: Path, rows: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def repository(tmp_path: Path, write_json: Callable[[Path, Any], Path]) -> Path:
    """BIG-bench's repository layout with three tasks: one file, one with sub-tasks and choices, one of free answers."""
    root = tmp_path / "repository" / "bigbench" / "benchmark_tasks"
    head = {"canary": "none", "name": "x", "description": "d", "keywords": []}
    questions = [{"input": f"Is {i} even?", "target": ["Yes. It is." if i % 2 == 0 else "No. It is odd. ", "other"]} for i in range(100)]
    write_json(root / "strategyqa" / "task.json", {**head, "examples": [*questions, questions[3]], "append_choices_to_input": False})
    write_json(root / "logical_deduction" / "task.json", head)
    for part, count in (("three_objects", 90), ("five_objects", 120)):
        examples = [{"input": f"{part} {i}: who is first?", "target_scores": {"The cat.": int(i % 2 == 0), "The ant.": int(i % 2 == 1)}} for i in range(count)]
        fields = {"append_choices_to_input": False, "task_prefix": "Objects in order.\n\n", "example_input_prefix": "\n", "example_output_prefix": "\n"}
        write_json(root / "logical_deduction" / part / "task.json", {**head, **fields, "examples": examples})
    choices = [{"input": f"Answer {i}", "target_scores": {f"Question b{i}?": 0, f"Question a{i}?": 1, f"Question c{i}?": 0}} for i in range(110)]
    write_json(root / "question_selection" / "task.json", {**head, "examples": choices})
    return root.parent.parent
