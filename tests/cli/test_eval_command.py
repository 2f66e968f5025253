"""``meteora eval report``: results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meteora_core.files import write_json


def document(model: str, **accuracies: float) -> dict[str, Any]:
    results = {task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.01} for task, value in accuracies.items()}
    return {"results": results, "model_name": model, "n-samples": {task: {"original": 9, "effective": 4} for task in results}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two models' results below runs/eval, and an older file that must not count."""
    import os

    folder = tmp_path / "runs" / "eval"
    write_json(folder / "base" / "results_2026-01-01T00-00-00.json", document("base", winowhy=0.9))
    os.utime(folder / "base" / "results_2026-01-01T00-00-00.json", (1, 1))
    write_json(folder / "base" / "results_2026-01-02T00-00-00.json", document("base", winowhy=0.25, gsm8k=0.125, disfl_qa=0.5))
    write_json(folder / "meteora" / "results_2026-01-02T00-00-00.json", document("meteora", winowhy=0.5, gsm8k=0.25, disfl_qa=0.25))
    return folder


def test_a_folder_of_runs_becomes_a_table(meteora, runs) -> None:
    ran = meteora("eval", "report", runs)
    assert ran.code == 0, ran.err
    lines = [line.split() for line in ran.out.replace("│", " ").splitlines()]
    assert ["winowhy", "acc", "4", "0.250", "±", "0.010", "0.500", "±", "0.010"] in lines
    assert "base" in ran.out
    assert "meteora" in ran.out


def test_markdown_and_labels(meteora, runs) -> None:
    ran = meteora("eval", "report", runs / "base", runs / "meteora", "--label", "A", "--label", "B", "--markdown")
    assert ran.out.splitlines()[0] == "| task | metric | rows | A | B |"
    assert "| winowhy | acc | 4 | 0.250 ± 0.010 | **0.500** ± 0.010 |" in ran.out.splitlines()
    assert meteora("eval", "report", runs / "base", "--label", "A", "--label", "B").code == 2


@pytest.mark.parametrize("kind", ["bar", "radar"])
def test_json_and_a_picture(meteora, runs, tmp_path, kind) -> None:
    ran = meteora("eval", "report", runs, "--json", "--plot", tmp_path / "new" / "x.png", "--kind", kind)
    assert ran.code == 0, ran.err
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [run["name"] for run in ran.json["runs"]] == ["base", "meteora"]
    row = ran.json["rows"][0]
    assert (row["task"], row["metric"], row["best"]) == ("winowhy", "acc", [1])
    assert row["values"] == [{"value": 0.25, "stderr": 0.01}, {"value": 0.5, "stderr": 0.01}]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("report",), 2, ""),
        (("report", "nowhere"), 1, "no such file or folder: nowhere"),
        (("report", "."), 1, "no results in ."),
        (("report", "runs/eval", "--markdown", "--json"), 2, "exclude each other"),
        (("--task", "winowhy", "report", "runs/eval"), 2, "--task belongs to `meteora eval`"),
        (("report", "runs/eval/base", "--plot", "x.png", "--kind", "pie"), 2, "pie"),
        ((), 2, "no task given"),
        (("--task", " , "), 2, "no task given"),
    ],
)
def test_mistakes_of_a_report(meteora, runs, arguments, code, message) -> None:
    (runs.parent.parent / "datasets").mkdir()
    ran = meteora("eval", *arguments)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert ran.out == ""


def test_help_shows_every_option_and_the_report(meteora) -> None:
    text = meteora("eval", "--help").out
    for word in ("--task", "--model", "--scoring", "--T", "report", "Example: meteora eval --task"):
        assert word in text
