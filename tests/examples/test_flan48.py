"""The recipe of FLANv2-48 on stand-ins: rows in the layout of the public files, and adapters on a local hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.flan48.__main__ import main
from examples.flan48.recipe import ADAPTER, PROMPT, adapter_name, read_samples, read_tasks
from meteora_core.data.rows import read_rows
from meteora_core.data.tasks import TASKS, get_task
from meteora_core.errors import DataError, UsageError
from meteora_core.evaluation.evaluate import evaluate
from meteora_core.json_files import write_json, write_jsonl
from meteora_core.routers import make_router
from support.evaluation_plans import plan_of
from support.evaluation_workspace import SIZES, make_workspace
from support.hub_server import serving

NAMES = {"anli_r9_10templates": "em", "wmt99_translate_aben": "bleu", "dart9_10templates": "rouge"}


def test_rows() -> list[dict[str, str]]:
    return [
        {"inputs": f"{task[:4]} question {index}?", "targets": f"answer {index}", "metric": metric, "domain": "x", "task": task}
        for task, metric in NAMES.items()
        for index in range(3)
    ]


test_rows.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def work(tmp_path: Path):
    """Files of rows; the tasks that are registered are forgotten afterwards."""
    before = dict(TASKS)
    write_jsonl(tmp_path / "rows.jsonl", test_rows())
    samples = [{"model_name": adapter_name(task), "sample": [{"inputs": f"train {index}", "targets": "yes"} for index in range(4)]} for task in NAMES]
    write_json(tmp_path / "samples.json", samples)
    yield tmp_path
    TASKS.clear()
    TASKS.update(before)


def test_rows_and_adapters_become_an_evaluation(work: Path, make_adapter, capsys, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names = [adapter_name(task) for task in NAMES]
    folders = {name: make_adapter(f"made/{name}", seed, llama=SIZES, target_modules=["q_proj", "v_proj"]) for seed, name in enumerate(names)}
    with serving() as hub:
        for name, folder in folders.items():
            hub.repositories[ADAPTER.format(name)] = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
        arguments = ["--train", str(work / "samples.json"), "--rows", str(work / "rows.jsonl"), "--work", str(work / "flan")]
        assert main(arguments, endpoint=hub.endpoint) == 0
    printed = capsys.readouterr().out
    assert "3 tasks in" in printed
    assert "--without-asked" in printed
    assert [get_task(name).metric for name in names] == ["exact", "bleu", "text"]
    assert {get_task(name).max_new_tokens for name in names} == {50}
    row = read_rows(work / "flan" / "datasets", names[0], "test")[2]
    assert (row.prompt, row.response) == (PROMPT.format("anli question 2?"), "answer 2")
    assert len(read_rows(work / "flan" / "datasets", names[1], "train")) == 4
    place = make_workspace(work / "world", lambda name, *given, **options: make_adapter(f"other/{name}", *given, **options), count=1)
    plan = plan_of(place, tuple(names), ("router:oracle", "router:centroid:without-asked"), save=False, max_new_tokens=3, limit=2)
    plan = type(plan)(**{**plan.__dict__, "data_dir": work / "flan" / "datasets", "adapters_dir": work / "flan" / "adapters", "make_router": make_router})
    outcomes = evaluate(plan, device=torch.device("cpu"), dtype=torch.float32)
    assert [list(outcome.results) for outcome in outcomes] == [names, names]


def test_what_does_not_fit_is_named(work: Path, capsys) -> None:
    rows, samples = test_rows(), list(read_samples(work / "samples.json"))
    assert [task.name for task in read_tasks(rows, samples, ["dart9"])] == ["dart9"]
    with pytest.raises(UsageError, match="no test rows of 'dart'"):
        read_tasks(rows, samples, ["dart"])
    with pytest.raises(DataError, match="no training rows of wmt99_translate_aben, dart9"):
        read_tasks(rows, samples[:4])
    with pytest.raises(DataError, match="test row 1 has the unknown metric 'f1'"):
        read_tasks([{**rows[0], "metric": "f1"}], samples)
    with pytest.raises(DataError, match="test row 1 has no text in the column 'targets'"):
        read_tasks([{"inputs": "x"}], samples)
    with pytest.raises(DataError, match="cannot be the name of a task"):
        adapter_name("../x_10templates")
    write_json(work / "wrong.json", {"model_name": "x"})
    with pytest.raises(DataError, match="is not a list of adapters with samples"):
        list(read_samples(work / "wrong.json"))
    assert main(["--train", str(work / "nowhere.jsonl"), "--rows", str(work / "rows.jsonl"), "--no-adapters"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert json.loads((work / "samples.json").read_text())[0]["model_name"] == "anli_r9"
