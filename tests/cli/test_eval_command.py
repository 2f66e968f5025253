"""``meteora eval`` on a tiny model, by one process and by two; ``meteora eval report``: results side by side."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from meteora_core.json_files import write_json, write_jsonl
from support import processes
from support.authors_files import write_authors
from support.evaluation_workspace import SIZES, TASKS, Workspace, make_tokenizer, make_workspace, rows


def document(model: str, **accuracies: float) -> dict[str, Any]:
    results = {task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.01} for task, value in accuracies.items()}
    return {"results": results, "model_name": model, "n-samples": {task: {"original": 9, "effective": 4} for task in results}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two models' results below runs/eval, and an older file that must not count."""
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


def test_a_report_relative_to_the_oracle(meteora, runs, tmp_path) -> None:
    write_json(runs / "oracle" / "results_2026-01-02T00-00-00.json", document("router:oracle", winowhy=0.5, gsm8k=0.25, disfl_qa=0.0))
    ran = meteora("eval", "report", runs, "--relative-to", "router:oracle", "--plot", tmp_path / "x.png")
    assert ran.code == 0, ran.err
    lines = [line.split() for line in ran.out.replace("│", " ").splitlines()]
    assert ["base", "2", "1", "50.0%", "45.1%", "to", "54.9%"] in lines
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "| meteora | 1 | **100.0%** |" in meteora("eval", "report", runs, "--relative-to", "router:oracle", "--markdown").out
    assert meteora("eval", "report", runs, "--relative-to", "base", "--json").json["relative_to"] == "base"
    for extra, message in ((("--kind", "radar", "--plot", "x.png"), "--kind has no effect here"), (("--label", "a"), "--label has no effect here")):
        ran = meteora("eval", "report", runs, "--relative-to", "base", *extra)
        assert ran.code == 2
        assert message in ran.err
    assert "there are no results of own" in meteora("eval", "report", runs, "--relative-to", "own").err


def test_help_shows_every_option_and_the_report(meteora) -> None:
    text = meteora("eval", "--help").out
    for word in ("--task", "--model", "--scoring", "--routing", "--launcher", "--T", "report", "Examples:"):
        assert word in text


@pytest.fixture
def place(tmp_path: Path, make_adapter) -> Workspace:
    return make_workspace(tmp_path, make_adapter, count=5)


def evaluate(meteora, place: Workspace, *arguments: str):
    return meteora("eval", "--base", place.base, "--max-new-tokens", "6", "--device", "cpu", *arguments)


def test_all_models_with_routing_and_debug(meteora, place) -> None:
    ran = evaluate(meteora, place, "--task", "singles", "--model", "all", "--routing", "--debug", "--limit", "3")
    assert ran.code == 0, ran.err
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in ran.out.replace("┃", "│").splitlines()]
    assert ["task", "metric", "rows", "base", "own", "meteora"] in lines
    assert any(line[:3] == ["logical_deduction", "accuracy", "3"] for line in lines)
    assert ["task", "own, answer", "own, all", *TASKS] in lines
    assert "prompt" in ran.err
    assert "reference" in ran.err
    assert ran.err.count("saved ") == 4
    (speed,) = [line for line in ran.err.splitlines() if line.startswith("speed: ")]
    assert [part.split()[0] for part in speed.removeprefix("speed: ").split("; ")] == ["base", "own", "meteora"]
    assert speed.count(" x base)") == 6
    (picture,) = (place.folder / "runs" / "eval" / "meteora").glob("routing_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = meteora("eval", "report", place.folder / "runs" / "eval", "--json")
    assert {run["name"] for run in report.json["runs"]} == {"base", "own", "meteora"}


def test_routers_by_seed_and_without_the_asked_adapter(meteora, place) -> None:
    ran = evaluate(
        meteora, place, "--task", "strategyqa", "--model", "router:oracle,router:random", "--without-asked", "--seeds", "1,2", "--limit", "2", "--json"
    )
    assert ran.code == 0, ran.err
    assert [made["model_name"] for made in ran.json] == ["router:oracle", "router:random:without-asked@1", "router:random:without-asked@2"]
    assert [made["config"]["model_args"]["router"]["seed"] for made in ran.json[1:]] == [1, 2]
    shown = evaluate(meteora, place, "--task", "strategyqa", "--model", "router:oracle,router:uniform", "--limit", "2", "--no-save")
    assert "share of router:oracle" in shown.out or "no task with a positive score of router:oracle is in all results" in shown.err
    for arguments, message in (
        (("--model", "router:oracle", "--without-asked"), "--without-asked has no effect here: it needs a router in --model"),
        (("--model", "router:spectr", "--seeds", "1"), "--seeds has no effect here: it needs a router in --model that depends on a seed"),
        (("--model", "router:random", "--seeds", "1,x"), "is not a list of seeds"),
        (("--model", "router:randon"), "did you mean 'random'?"),
        (("--model", "router:uniform", "--top-k", "2"), "--top-k has no effect here"),
    ):
        failed = evaluate(meteora, place, "--task", "strategyqa", *arguments)
        assert failed.code == 2
        assert message in failed.err


def test_json_is_the_results_document(meteora, place) -> None:
    ran = evaluate(meteora, place, "--task", "strategyqa,composite_3", "--json", "--T", "3", "--top-k", "1", "--scoring", "paper")
    assert ran.code == 0, ran.err
    assert ran.json["configs"]["composite_3"]["temperature"] == 3
    assert ran.json["configs"]["strategyqa"]["top_k"] == 1
    assert ran.json["config"]["scoring"] == "paper"
    (file,) = (place.folder / "runs" / "eval" / "meteora").glob("results_*.json")
    assert json.loads(file.read_text()) == ran.json
    both = evaluate(meteora, place, "--task", "strategyqa", "--model", "base,meteora", "--json", "--no-save", "--limit", "2")
    assert [document["model_name"] for document in both.json] == ["base", "meteora"]
    for document in both.json:
        speed, counts = document["meteora"]["speed"], document["meteora"]["counts"]["strategyqa"]
        assert (speed["rows"], speed["new_tokens"], speed["prompt_tokens"]) == (2, counts["new_tokens"], counts["prompt_tokens"])
        assert speed["rows_per_second"] == pytest.approx(2 / speed["seconds"], rel=0.02)
        assert speed["tokens_per_second"] == pytest.approx(counts["new_tokens"] / speed["seconds"], rel=0.02)
        assert speed["all_tokens_per_second"] == pytest.approx((counts["new_tokens"] + counts["prompt_tokens"]) / speed["seconds"], rel=0.02)
        assert speed["tasks"]["strategyqa"]["seconds"] == speed["seconds"] <= counts["seconds"] + 1e-3


def test_a_checkpoint_in_the_authors_layout(meteora, place, tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    made = write_authors(tmp_path / "theirs", count=3, vocabulary=SIZES["vocab_size"])
    make_tokenizer().save_pretrained(made.base)
    arguments = ("--task", "strategyqa", "--checkpoint", made.checkpoint, "--device", "cpu", "--limit", "2", "--max-new-tokens", "4", "--json", "--no-save")
    ran = meteora("eval", *arguments, "--base", made.base, "--adapters", made.adapters)
    assert ran.code == 0, ran.err
    assert ran.json["config"]["model_args"]["base"] == str(made.base)
    unnamed = meteora("eval", *arguments)
    assert (unnamed.code, unnamed.out) == (2, "")
    assert "does not name its base model" in unnamed.err
    assert "--base" in unnamed.err


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_a_quantised_base_needs_a_gpu(meteora, place, command, monkeypatch) -> None:

    def refused(*flags: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?")))
        arguments = ("--task", "strategyqa", "--no-save") if command == "eval" else ()
        ran = meteora(command, "--checkpoint", place.checkpoint, "--device", "cpu", *flags, *arguments)
        assert (ran.code, ran.out) == (2, "")
        return ran.err

    assert "a 4bit base model needs a CUDA GPU, and the device is cpu" in refused("--load-in-4bit")
    assert "an 8bit base model needs a CUDA GPU, and the device is cpu" in refused("--load-in-8bit")
    assert "exclude each other" in refused("--load-in-4bit", "--load-in-8bit")
    monkeypatch.setenv("METEORA_MODEL__QUANTIZATION", "4bit")
    assert "a 4bit base model" in refused()


def test_warnings_are_counted(meteora, place) -> None:
    listed = rows("strategyqa", 4)
    listed[0]["response"] = ""
    write_jsonl(place.data / "strategyqa" / "test.jsonl", listed)
    ran = evaluate(meteora, place, "--task", "strategyqa", "--model", "base", "--no-save")
    assert "base: strategyqa: " in ran.err
    assert "1 reference that cannot be scored" in ran.err
    assert not (place.folder / "runs" / "eval").exists()


def test_skipped_prompts_stand_in_the_table(meteora, place) -> None:
    ran = evaluate(meteora, place, "--task", "strategyqa", "--model", "base", "--no-save", "--max-prompt-tokens", "25")
    assert re.search(r"strategyqa\s+.\s+accuracy\s+.\s+\d+ \(\d skipped\)", ran.out), ran.out
    assert re.search(r"over \d rows \(\d skipped as too long\)", ran.err)
    ran = evaluate(meteora, place, "--task", "strategyqa", "--model", "base", "--no-save", "--max-prompt-tokens", "3")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == "hint: raise --max-prompt-tokens (eval.max_prompt_tokens)"


def test_a_task_of_which_all_prompts_are_skipped_says_so_and_the_others_go_on(meteora, place) -> None:
    listed = rows("question_selection", 2)
    for row in listed:
        row["prompt"] += "x" * 40
    write_jsonl(place.data / "question_selection" / "test.jsonl", listed)
    ran = evaluate(meteora, place, "--task", "question_selection,strategyqa", "--model", "base", "--no-save", "--max-prompt-tokens", "30")
    assert ran.code == 0
    assert re.search(r"question_selection\s+.\s+–\s+.\s+0 \(2 skipped\)\s+.\s+–", ran.out), ran.out
    assert re.search(r"strategyqa\s+.\s+accuracy", ran.out)
    assert "base: question_selection: all 2 prompts skipped as too long" in ran.err
    assert "base: question_selection: all 2 prompts of question_selection are too long: the shortest has" in ran.err


def test_the_hint_for_a_composite_builds_it(meteora, place) -> None:
    shutil.rmtree(place.data / "composite_3")
    for task in TASKS:
        write_jsonl(place.data / task / "train.jsonl", [{"prompt": f"[INST] train {i} [/INST]\n", "response": "yes"} for i in range(4)])
    arguments = ("--task", "composite_3", "--model", "base", "--limit", "1", "--max-new-tokens", "2", "--no-save")
    ran = evaluate(meteora, place, *arguments)
    assert ran.code == 1
    assert "no test rows of composite_3 in datasets" in ran.err
    command = shlex.split(re.findall("`([^`]+)`", ran.err)[0])
    assert meteora(*command[1:]).code == 0, command
    assert evaluate(meteora, place, *arguments).code == 0


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(meteora, place) -> None:
    arguments = ("--task", "logical_deduction,composite_3", "--routing", "--json")
    one = evaluate(meteora, place, *arguments).json
    (place.folder / "runs" / "eval").rename(place.folder / "runs" / "first")
    two = evaluate(meteora, place, *arguments, "--launcher", "ddp", "--processes", "2")
    assert two.code == 0, two.err
    assert timeless(two.json) == timeless(one)
    folder = place.folder / "runs" / "eval" / "meteora"
    assert len(list(folder.glob("results_*.json"))) == 1
    for task in ("logical_deduction", "composite_3"):
        (mine,), (theirs,) = folder.glob(f"samples_{task}_*"), (place.folder / "runs" / "first" / "meteora").glob(f"samples_{task}_*")
        assert mine.read_text() == theirs.read_text()
    assert not list(folder.glob(".*"))


def test_processes_that_another_launcher_started_share_the_rows_too(place, meteora) -> None:
    one = evaluate(meteora, place, "--task", "strategyqa", "--json", "--no-save").json
    arguments = ["eval", "--task", "strategyqa", "--json", "--no-save", "--base", str(place.base), "--max-new-tokens", "6", "--device", "cpu"]
    first, second = processes.side_by_side(processes.meteora, arguments, folder=place.folder)
    assert timeless(json.loads(first.out)) == timeless(one)
    assert not second.out


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    """A results document without what a clock says."""
    made = {key: value for key, value in document.items() if "time" not in key and key != "date"}
    del made["meteora"]["speed"]
    for counts in made["meteora"]["counts"].values():
        del counts["seconds"]
    made["meteora"].pop("routing_counts", None)
    return made


def test_processes_that_fail_or_are_not_told_how_many(meteora, place) -> None:
    unknown = evaluate(meteora, place, "--task", "strategyqa", "--launcher", "ddp")
    assert unknown.code == 2
    assert "needs a number of processes" in unknown.err
    missing = evaluate(meteora, place, "--task", "winowhy", "--launcher", "ddp", "--processes", "2")
    assert missing.code == 1
    assert missing.err.count("no test rows of winowhy") == 1


def test_the_live_table_shows_cells_bars_and_warnings(monkeypatch) -> None:
    from rich.console import Console

    from meteora_cli.commands.eval_live import EvalTable
    from meteora_core.data.rows import Row
    from meteora_core.data.tasks import TASKS as KNOWN
    from meteora_core.data.tasks import get_task
    from meteora_core.evaluation.runner import Sample, TaskResult
    from meteora_core.evaluation.scoring import Scores, evaluate_responses

    def shown() -> str:
        console = Console(width=140, height=60, file=io.StringIO())
        console.print(table)
        return console.file.getvalue()

    singles = [name for name, task in KNOWN.items() if not task.is_composite]
    table = EvalTable(["base", "meteora"], singles)
    with table.task("base: winowhy", total=4, unit="rows") as bar:
        bar.update(3, **{"tok/s": "120"})
        assert "3/4" in shown()
        assert "tok/s 120" in shown()
    samples = [Sample(0, Row("p", "correct"), "", "", 0)]
    table.done("base", TaskResult(get_task("winowhy"), samples, evaluate_responses("winowhy", [""], ["correct"]), skipped=2))
    text = shown()
    assert "accuracy 0.000" in text
    assert "base: 1 empty answer; base: 2 prompts skipped as too long" in text
    table.done("meteora", TaskResult(get_task("winowhy"), [], Scores({}, {}, []), skipped=4))
    assert "all skipped" in shown()
    assert "tok/s" not in text
    with table.task("reading adapters"):
        assert "reading adapters" in shown()
