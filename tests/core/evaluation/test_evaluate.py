"""Whole evaluations of a tiny model: files, resuming, several models, bad input, full disks."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core.data.tasks import TASKS as TASK_TABLE
from meteora_core.errors import AdapterError, CheckpointError, DataError, StorageError, UsageError
from meteora_core.evaluation import eval_plan, results
from meteora_core.evaluation.eval_plan import choose_tasks
from meteora_core.evaluation.evaluate import ModelResults
from meteora_core.evaluation.report import compare
from meteora_core.json_files import write_jsonl
from support.evaluation_plans import plan_of, run
from support.evaluation_workspace import TASKS, Workspace, make_workspace, rows


@pytest.fixture
def place(tmp_path: Path, make_adapter) -> Workspace:
    return make_workspace(tmp_path, make_adapter)


TIMES = ("date", "start_time", "end_time", "total_evaluation_time_seconds")


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    """A results document without durations and dates."""
    made = {key: value for key, value in json.loads(json.dumps(document)).items() if key not in TIMES}
    del made["meteora"]["speed"]
    for counts in made["meteora"]["counts"].values():
        del counts["seconds"]
    return made


def samples(outcome: ModelResults, task: str) -> list[dict[str, Any]]:
    assert outcome.file is not None
    file = outcome.file.parent / outcome.file.name.replace("results_", f"samples_{task}_").replace(".json", ".jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_all_models_on_singles_and_a_composite(place) -> None:
    told: list[tuple[str, str]] = []
    made = run(plan_of(place, (TASKS[0], "composite_3"), ("base", "own", "meteora")), on_result=lambda model, result: told.append((model, result.task.name)))
    assert told == [(model, task) for model in ("base", "own", "meteora") for task in (TASKS[0], "composite_3") if (model, task) != ("own", "composite_3")]
    by_model = {outcome.model: outcome for outcome in made}
    assert len({json.dumps([row["resps"] for row in samples(outcome, TASKS[0])]) for outcome in made}) == 3
    document = json.loads(by_model["meteora"].file.read_text())
    assert document == json.loads(json.dumps(by_model["meteora"].document))
    assert document["configs"]["composite_3"]["temperature"] == 15
    assert document["configs"][TASKS[0]]["temperature"] == 1
    assert document["n-samples"][TASKS[0]] == {"original": 7, "effective": 7}
    assert document["config"]["model_args"]["weights_sha256"]
    assert [row["doc_id"] for row in samples(by_model["base"], TASKS[0])] == list(range(7))
    assert not list(place.folder.rglob("*.partial.jsonl"))


@pytest.mark.parametrize("model", ["meteora", TASKS[1]])
def test_a_stopped_run_ends_with_the_same_file(place, model) -> None:
    plan = plan_of(place, TASKS[:2], (model,), batch_size=2, routing=model == "meteora")
    whole = run(plan)[0]

    class Stop(Exception):
        pass

    class Stopping:
        """A progress report that stops the run in the middle of the second task."""

        rows = 0

        def task(self, title: str, **_: Any) -> Any:
            return self

        def __enter__(self) -> Stopping:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def note(self, message: str) -> None:
            return None

        def update(self, advance: float = 0, **fields: str) -> None:
            if "tok/s" in fields:
                Stopping.rows += 1
                if Stopping.rows == 10:
                    raise Stop

    with pytest.raises(Stop):
        run(plan, progress=Stopping())
    kept = [len(file.read_text().splitlines()) - 1 for file in sorted(place.folder.rglob("*.partial.jsonl"))]
    assert sum(kept) == 10
    again = run(plan_of(place, TASKS[:2], (model,), batch_size=3, routing=model == "meteora", scoring="corrected"))[0]
    assert [outcome.document["meteora"]["speed"]["rows"] for outcome in (whole, again)] == [14, 4]
    one, other = timeless(whole.document), timeless(again.document)
    for document in (one, other):
        document["config"].pop("batch_size")
        document["config"]["options"].pop("batch_size")
        document["meteora"].pop("routing_counts", None)
    if model == "meteora":
        torch.testing.assert_close(flat(one["meteora"].pop("routing")), flat(other["meteora"].pop("routing")), rtol=0, atol=1e-5)
    assert one == other
    assert [samples(whole, task) for task in TASKS[:2]] == [samples(again, task) for task in TASKS[:2]]


class Stop(Exception):
    pass


def stop_after(monkeypatch, count: int, folder: str = "") -> list[tuple[str, int]]:
    """Return a list to which every stored row is added. The run stops at the ``count``-th row of a model."""
    made: list[tuple[str, int]] = []
    add = results.SampleWriter.add

    def adding(self, doc_id, output, tokens=()):
        add(self, doc_id, output, tokens)
        made.append((self.path.parent.name, doc_id))
        if sum(name == (folder or name) for name, _ in made) == count:
            raise Stop

    monkeypatch.setattr(results.SampleWriter, "add", adding)
    return made


def change_an_adapter(place: Workspace) -> None:
    file = place.adapters / TASKS[0] / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 40}))


def change_the_base(place: Workspace) -> None:
    file = place.base / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor.flip(0) if "down_proj" in name else tensor for name, tensor in weights.items()}, file, {"format": "pt"})


def change_the_end_tokens(place: Workspace) -> None:
    file = place.base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": list(range(2, 112))}))


@pytest.mark.parametrize(
    ("model", "change"),
    [(TASKS[0], change_an_adapter), ("peft-arrow", change_an_adapter), ("base", change_the_base), (TASKS[0], change_the_base), ("base", change_the_end_tokens)],
)
def test_rows_of_another_state_of_the_model_are_not_taken(place, monkeypatch, model, change) -> None:
    plan = plan_of(place, TASKS[:1], (model,), batch_size=1)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 4)
        run(plan)
    change(place)
    made = run(plan)[0]
    assert made.document["meteora"]["speed"]["rows"] == 7


@pytest.mark.parametrize("change", [{"max_new_tokens": 3}, {"routing_temperature": 9.0}])
def test_rows_of_another_definition_of_the_task_are_not_taken(place, monkeypatch, change) -> None:
    plan = plan_of(place, TASKS[:1], ("meteora",), batch_size=1, max_new_tokens=None)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 4)
        run(plan)
    with monkeypatch.context() as patch:
        patch.setitem(TASK_TABLE, TASKS[0], replace(TASK_TABLE[TASKS[0]], **change))
        assert run(plan)[0].document["meteora"]["speed"]["rows"] == 7


def test_finished_models_of_a_stopped_run_generate_nothing_again(place, monkeypatch) -> None:
    plan = plan_of(place, TASKS[:1], ("base", "own", "meteora"), batch_size=1)
    with monkeypatch.context() as patch:
        first = stop_after(patch, 3, "meteora")
        with pytest.raises(Stop):
            run(plan)
    assert [sum(name == model for name, _ in first) for model in plan.models] == [7, 7, 3]
    written = {model: list((plan.out_dir / model).glob("results_*.json")) for model in ("base", "own")}
    before = {file: file.read_bytes() for files in written.values() for file in files}
    assert len(before) == 2
    time.sleep(1.1)
    again = stop_after(monkeypatch, 99)
    outcomes = run(plan)
    assert [name for name, _ in again] == ["meteora"] * 4
    assert {file: file.read_bytes() for file in before} == before
    assert [outcome.file for outcome in outcomes[:2]] == [written["base"][0], written["own"][0]]
    assert all(len(list((plan.out_dir / model).glob("results_*.json"))) == 1 for model in plan.models)
    assert [row["doc_id"] for row in samples(outcomes[0], TASKS[0])] == list(range(7))
    assert not list(place.folder.rglob("*.partial.jsonl"))
    again.clear()
    run(plan)
    assert len(again) == 21


def test_results_with_another_limit_are_not_replaced(place, monkeypatch) -> None:
    plan = plan_of(place, TASKS[:1], ("base", "own"), batch_size=1, limit=5)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2, "own")
        run(plan)
    (old,) = (plan.out_dir / "base").glob("results_*.json")
    before = old.read_bytes()
    time.sleep(1.1)
    outcome = run(plan_of(place, TASKS[:1], ("base", "own"), batch_size=1))[0]
    assert outcome.document["meteora"]["speed"]["rows"] == 2
    assert outcome.file != old
    assert old.read_bytes() == before


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [float(value)] if isinstance(value, int | float) else []


def test_rows_of_another_run_are_not_taken(place) -> None:
    folder = place.folder / "runs" / "eval" / "base"
    with results.SampleWriter(results.partial_file(folder, TASKS[0]), {"some": "other run"}) as writer:
        writer.add(0, "stale", [5])
    assert "stale" not in json.dumps(samples(run(plan_of(place, TASKS[:1], ("base",)))[0], TASKS[0]))


@pytest.mark.parametrize("moment", ["row", "samples", "results"])
def test_a_full_disk_keeps_the_rows_so_far(place, monkeypatch, moment) -> None:
    plan = plan_of(place, TASKS[:1], ("base",), batch_size=1)
    whole = run(plan)[0]
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if moment == "row":
            real = results.SampleWriter._append

            lines: list[bytes] = []

            def append(self, line):
                if len(lines) == 4:
                    raise full
                lines.append(line)
                real(self, line)

            patch.setattr(results.SampleWriter, "_append", append)
        else:
            import os

            replace = os.replace

            def move(source, target):
                if moment in str(target):
                    raise full
                replace(source, target)

            patch.setattr(os, "replace", move)
        with pytest.raises(StorageError, match="no space left on the disk") as caught:
            run(plan)
        assert caught.value.hint
    (partial,) = place.folder.rglob("*.partial.jsonl")
    assert all(json.loads(line) for line in partial.read_text().splitlines())
    assert len(partial.read_text().splitlines()) == (4 if moment == "row" else 8)
    again = run(plan)[0]
    assert timeless(again.document) == timeless(whole.document)
    assert samples(again, TASKS[0]) == samples(whole, TASKS[0])


def test_a_short_write_is_undone(tmp_path) -> None:
    path = tmp_path / "s.jsonl"
    writer = results.SampleWriter(path, {"a": 1})
    writer.add(0, "first")
    real = writer._handle

    class Full:
        """A file that accepts ten bytes of the next write, and then nothing."""

        calls = 0

        def write(self, data: memoryview) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(data[:10])

        def truncate(self, size: int) -> int:
            return real.truncate(size)

        def close(self) -> None:
            real.close()

    writer._handle = Full()
    with pytest.raises(StorageError, match="no space left"):
        writer.add(1, "second")
    writer.close()
    assert [json.loads(line).get("output") for line in path.read_text().splitlines()] == [None, "first"]
    with results.SampleWriter(path, {"a": 1}) as again:
        assert again.done == {0: "first"}


def test_empty_references_are_counted_and_left_out(place) -> None:
    listed = rows(TASKS[0], 4)
    listed[1]["response"] = ""
    listed[2]["response"] = "  \n"
    write_jsonl(place.data / TASKS[0] / "test.jsonl", listed)
    for scoring in ("corrected", "paper"):
        outcome = run(plan_of(place, TASKS[:1], ("base",), scoring=scoring))[0]
        counts = outcome.document["meteora"]["counts"][TASKS[0]]
        assert counts["samples"] == 4
        assert counts["unusable_references"] == 2
        assert [row["accuracy"] is None for row in samples(outcome, TASKS[0])] == [scoring == "corrected" and i in (1, 2) for i in range(4)]


def test_prompts_that_are_too_long_are_skipped_and_counted(place) -> None:
    outcome = run(plan_of(place, TASKS[:1], ("base",), max_prompt_tokens=25))[0]
    skipped = outcome.document["meteora"]["counts"][TASKS[0]]["skipped_prompts"]
    kept = [index for index, row in enumerate(rows(TASKS[0], 7)) if len(row["prompt"]) <= 25]
    assert 0 < skipped == 7 - len(kept)
    assert [row["doc_id"] for row in samples(outcome, TASKS[0])] == kept
    with pytest.raises(DataError, match="all 7 prompts of logical_deduction are too long: the shortest has 21 tokens and --max-prompt-tokens is 3") as raised:
        run(plan_of(place, TASKS[:1], ("base",), max_prompt_tokens=3))
    assert raised.value.hint == "raise --max-prompt-tokens (eval.max_prompt_tokens)"


def test_a_task_whose_prompts_are_all_too_long_does_not_stop_the_others(place) -> None:
    listed = rows(TASKS[1], 3)
    for row in listed:
        row["prompt"] += "x" * 40
    write_jsonl(place.data / TASKS[1] / "test.jsonl", listed)
    seen: list[tuple[str, int]] = []
    tasks = (TASKS[1], TASKS[0])
    outcomes = run(plan_of(place, tasks, ("base", TASKS[0]), max_prompt_tokens=30), on_result=lambda model, result: seen.append((model, len(result.samples))))
    assert [name for name, _ in seen] == ["base", "base", TASKS[0], TASKS[0]]
    assert [count > 0 for _, count in seen] == [False, True, False, True]
    for outcome in outcomes:
        result = outcome.results[TASKS[1]]
        assert (result.skipped, result.scores.metrics) == (3, {})
        assert re.match(r"all 3 prompts of \w+ are too long: the shortest has \d+ tokens and --max-prompt-tokens is 30", result.notes[0])
        saved = json.loads(outcome.file.read_text())
        assert saved["results"].keys() == set(tasks)
        assert saved["meteora"]["counts"][TASKS[1]]["skipped_prompts"] == 3
        assert saved["n-samples"][TASKS[1]] == {"original": 3, "effective": 0}
        assert not samples(outcome, TASKS[1])
        assert {line.task for line in compare([saved]).rows} == {TASKS[0]}
    assert not list(place.folder.rglob(".*partial*"))


def test_the_papers_limit_is_for_paper_scoring(place, monkeypatch) -> None:
    monkeypatch.setattr(eval_plan, "PAPER_TOKENS", 26)
    plan = plan_of(place, TASKS[:1], ("base",), scoring="paper", max_new_tokens=64)
    options = (plan.options, plan.options.model_copy(update={"scoring": "corrected"}), plan.options.model_copy(update={"max_prompt_tokens": 30}))
    paper, corrected, asked = (run(replace(plan, options=each))[0].results[TASKS[0]] for each in options)
    sizes = [len(row["prompt"]) for row in rows(TASKS[0], 7)]
    assert [paper.skipped, corrected.skipped, asked.skipped] == [sum(size > 25 for size in sizes), 0, sum(size > 30 for size in sizes)]
    assert max(len(sample.row.prompt) + sample.tokens for sample in paper.samples) <= 26
    assert max(len(sample.row.prompt) + sample.tokens for sample in corrected.samples) > 26
    monkeypatch.setattr(eval_plan, "PAPER_TOKENS", 9)
    with pytest.raises(DataError, match="and paper scoring allows 9 for prompt and answer together") as raised:
        run(plan)
    assert raised.value.hint == "use --scoring corrected, or set another limit with --max-prompt-tokens"


def test_rows_under_another_limit_are_not_taken(place, monkeypatch) -> None:
    plan = plan_of(place, TASKS[:1], ("base",), batch_size=1)
    for change in ({"max_prompt_tokens": 900}, {"scoring": "paper"}):
        stop_after(monkeypatch, 3)
        with pytest.raises(Stop):
            run(plan)
        monkeypatch.undo()
        counted = run(replace(plan, options=plan.options.model_copy(update=change)))[0].document["meteora"]["speed"]
        assert counted["rows"] == 7


def test_rows_that_cannot_be_read_are_named(place) -> None:
    file = place.data / TASKS[0] / "test.jsonl"
    write_jsonl(file, [*rows(TASKS[0], 2), {"prompt": "", "response": "x"}])
    tokenizer = json.loads((place.base / "tokenizer_config.json").read_text())
    (place.base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "add_bos_token": False}))
    with pytest.raises(DataError, match="the prompt of test row 2 of logical_deduction is empty"):
        run(plan_of(place, TASKS[:1], ("base",)))


def test_tasks_named_twice_run_once_and_models_keep_their_folders(place) -> None:
    outcome = run(plan_of(place, (TASKS[0], TASKS[0]), ("base",), save=False))[0]
    assert outcome.document["meteora"]["speed"]["rows"] == 7
    with pytest.raises(UsageError, match=r"the results of '.*logical_deduction' and '.*logical_deduction' would be written to the same folder"):
        twin = place.folder / "adapters_logical_deduction"
        shutil.copytree(place.adapters / TASKS[0], twin)
        run(plan_of(place, TASKS[:1], (str(place.adapters / TASKS[0]), str(twin))))


def test_results_stay_in_their_folder(place, monkeypatch) -> None:
    inside = place.adapters / TASKS[0] / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    outcome = run(plan_of(place, TASKS[:1], ("..",)))[0]
    assert outcome.file is not None
    assert outcome.file.parent.parent == place.folder / "runs" / "eval"


def test_prompts_that_fill_the_models_context_are_skipped_and_answers_stay_within_it(place) -> None:
    longest = max(len(row["prompt"]) for row in rows(TASKS[0], 7))
    config = json.loads((place.base / "config.json").read_text())
    (place.base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    outcome = run(plan_of(place, TASKS[:1], ("base",), max_new_tokens=64))[0]
    assert outcome.document["meteora"]["counts"][TASKS[0]]["skipped_prompts"] == sum(len(row["prompt"]) == longest for row in rows(TASKS[0], 7)) > 0
    result = outcome.results[TASKS[0]]
    assert max(len(sample.row.prompt) + sample.tokens for sample in result.samples) == longest
    (place.base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 5}))
    with pytest.raises(DataError, match="and the model's context of 5 leaves no room for an answer") as raised:
        run(plan_of(place, TASKS[:1], ("base",)))
    assert raised.value.hint == "use a base model with a longer context"


def test_what_is_missing_is_named_before_a_model_is_loaded(place, monkeypatch) -> None:
    from meteora_core.model import base as base_module

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base_module, "load_base", never)
    write_jsonl(place.data / "winowhy" / "train.jsonl", rows("winowhy", 3))
    with pytest.raises(DataError, match="no test rows of winowhy") as caught:
        run(plan_of(place, (TASKS[0], "winowhy"), ("base",)))
    assert "meteora data build --task winowhy" in str(caught.value.hint)
    write_jsonl(place.data / "winowhy" / "test.jsonl", [])
    with pytest.raises(DataError, match="has no rows"):
        run(plan_of(place, ("winowhy",), ("base",)))
    write_jsonl(place.data / "winowhy" / "test.jsonl", rows("winowhy", 3))
    with pytest.raises(UsageError, match="no adapter for winowhy") as caught:
        run(plan_of(place, ("winowhy",), ("base", "own")))
    command = f"meteora train adapters --task winowhy --adapters {place.adapters} --data {place.data} --base {place.base}"
    assert caught.value.hint == f"train it with `{command}`"
    with pytest.raises(UsageError, match="no model 'strategyqq'") as caught:
        run(plan_of(place, ("winowhy",), ("strategyqq",)))
    assert caught.value.hint == "did you mean 'strategyqa'?"
    with pytest.raises(UsageError, match="a composite has no adapter of its own"):
        run(plan_of(place, ("composite_3",), ("own",)))
    with pytest.raises(UsageError, match="top_k is 4, but the checkpoint has 3 adapters"):
        run(plan_of(place, TASKS[:1], ("meteora",), top_k=4))
    with pytest.raises(UsageError, match="only for the model meteora"):
        run(plan_of(place, TASKS[:1], ("base",), routing=True))
    weights = place.adapters / TASKS[0] / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle file"):
        run(plan_of(place, TASKS[:1], ("own",)))
    weights.with_name("adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors"):
        run(plan_of(place, TASKS[:1], (TASKS[0],)))
    (place.checkpoint / "meteora_config.json").unlink()
    with pytest.raises(CheckpointError):
        run(plan_of(place, TASKS[:1], ("meteora",)))


def test_names_of_groups(place) -> None:
    assert choose_tasks(["singles"], place.data) == TASKS
    assert choose_tasks(["composites", TASKS[1]], place.data) == ("composite_3", TASKS[1])
    assert set(choose_tasks(["all"], place.data)) == {*TASKS, "composite_3"}
    with pytest.raises(UsageError, match="no singles are built"):
        choose_tasks(["singles"], place.folder / "nowhere")
    with pytest.raises(UsageError, match="no datasets are built in nowhere") as caught:
        choose_tasks(["all"], Path("nowhere"))
    assert caught.value.hint == "for example: `meteora data build --task strategyqa --out nowhere`"
    with pytest.raises(UsageError, match="no composites are built") as caught:
        choose_tasks(["composites"], Path("datasets"))
    assert str(caught.value.hint).endswith("`meteora data composite --n 3`")
