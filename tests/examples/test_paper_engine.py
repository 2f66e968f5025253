"""The runner of the experiment without any model: parts, limits, records, failures."""

from __future__ import annotations

import json
import time
import tomllib

import pytest

from examples.paper.engine import Engine, Stopped
from examples.paper.plan import HERE, PARTS, Experiment, Step, load_experiment, settings_text
from meteora_core.errors import MeteoraError, UsageError


class Fake:
    """Pretends to run commands: writes what ``--out`` names; exit codes come from a list."""

    def __init__(self, *codes: int | None) -> None:
        self.codes, self.ran = list(codes), []

    def __call__(self, arguments, seconds):
        from pathlib import Path

        self.ran.append(arguments)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0 and "--out" in arguments:
            folder = Path(arguments[arguments.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "meteora.safetensors").write_text(" ".join(arguments))
        return code


STEPS = (
    Step("a", "first", "train --out {work}/a --max-steps {steps}", makes=("{work}/a",)),
    Step("b", "second", "train --out {work}/b", needs=("a",), makes=("{work}/b",)),
    Step("c", "second", "train --out {work}/c", hub=True),
)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"work": "w", "steps": 3, "rank": 8, "base": "x"}
    experiment = Experiment(STEPS, values, {"model": {"base": "x"}, "train_gates": {"seed": 1}}, {}, {}, tmp_path / "docs", 60.0, "test")
    return Engine(experiment, "run-it", Fake(), lambda line: None)


def test_done_steps_are_left_out_and_others_run(engine) -> None:
    assert engine.run() == ["a", "b"]
    assert engine.run() == []
    assert json.loads((engine.experiment.work / "steps" / "c.json").read_text())["left_out"]
    assert engine.forget(["a"]) == ["a", "b"]
    with pytest.raises(MeteoraError, match="needs step a, which is not done") as caught:
        engine.run(["b"])
    assert caught.value.hint == "run-it --only a"
    with pytest.raises(UsageError, match="no step or stage 'z'"):
        engine.run(["z"])


def test_a_command_that_is_stopped_by_its_limit_goes_on_in_parts(engine) -> None:
    engine.run_command = Fake(None, None, 0)
    assert engine.run(["a"]) == ["a"]
    assert len(engine.run_command.ran) == 3
    assert json.loads(engine.record_file(STEPS[0]).read_text())["parts"] == 3


def test_a_command_that_never_ends_is_given_up(engine) -> None:
    engine.run_command = Fake(*[None] * 20)
    with pytest.raises(MeteoraError, match="does not end in 12 parts"):
        engine.run(["a"])


def test_the_time_of_a_call_ends_it(engine) -> None:
    engine.deadline = time.monotonic() - 1
    with pytest.raises(Stopped) as caught:
        engine.run(["a"])
    assert caught.value.exit_code == 75
    assert engine.run_command.ran == []


def test_a_failed_command_stops_everything_and_is_not_recorded(engine) -> None:
    engine.run_command = Fake(1)
    with pytest.raises(MeteoraError, match="step a failed with exit code 1"):
        engine.run()
    assert not engine.record_file(STEPS[0]).exists()
    assert engine.run() == ["a", "b"]


def test_steps_are_left_out_by_patterns_and_unknown_ones_are_refused(tmp_path) -> None:
    text = (HERE / "toy.toml").read_text()
    assert 'without = ["data-hub", ' in text
    every = {step.name for step in load_experiment("full").steps}
    file = tmp_path / "mine.toml"
    file.write_text(text.replace('without = ["data-hub", ', 'without = ["data-hub", "routers-*", "eval-*-T60", '))
    kept = {step.name for step in load_experiment(file).steps}
    assert {"routers-choosing", "routers-meteora-without", "eval-ridge-T60"} <= every - kept
    assert "eval-ridge-T1" in kept
    file.write_text(text.replace('without = ["data-hub", ', 'without = ["data-hub", "routters-*", '))
    with pytest.raises(UsageError, match="leaves out 'routters-\\*', and there is no such step"):
        load_experiment(file)


def test_a_command_without_an_outcome_is_an_error(engine) -> None:
    engine.run_command = lambda arguments, seconds: 0
    with pytest.raises(MeteoraError, match="created nothing in w/a"):
        engine.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine: (engine.experiment.work / "a" / "meteora.safetensors").unlink(), "which step a created, no longer exists"),
        (lambda engine: (engine.experiment.work / "a" / "meteora.safetensors").write_text("x"), "its hash differs"),
        (lambda engine: engine.experiment.values.update(steps=4), "was done by another command: meteora --config w/meteora.toml train --out w/a --max-steps 3"),
        (lambda engine: engine.experiment.settings["train_gates"].update(seed=2), "train_gates.seed was 1, is 2"),
    ],
)
def test_what_does_not_fit_any_more_names_the_repair(engine, change, message) -> None:
    engine.run()
    change(engine)
    with pytest.raises(MeteoraError) as caught:
        engine.run()
    assert message in caught.value.message
    assert caught.value.hint == "run-it --again a"


@pytest.mark.parametrize("sizes", ["full", "toy"])
def test_every_placeholder_of_the_sizes_is_filled(sizes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(sizes)
    engine = Engine(experiment, "x", Fake(), lambda line: None)
    for step in experiment.steps:
        assert "{" not in engine.command_line(step)
        assert all("{" not in str(path) for path in engine.makes(step))
    made = {str(path) for step in experiment.steps for path in engine.makes(step)}
    assert {f"{experiment.work}/eval/{place}" for place in experiment.roles.values()} <= made
    assert set(experiment.titles) == set(experiment.roles)
    (tmp_path / "meteora.toml").write_text(settings_text(experiment.settings))
    from meteora_core.settings import load_settings

    assert str(load_settings().paths.adapters) == f"{experiment.work}/adapters"


def test_a_setting_of_the_gates_does_not_touch_the_adapters() -> None:
    experiment = load_experiment("toy")
    assert set(experiment.relevant_settings(experiment.step("adapters-1"))) == {"model", "train_adapters"}
    assert set(experiment.relevant_settings(experiment.step("gates-ridge"))) == {"model", "train_gates"}
    assert set(experiment.relevant_settings(experiment.step("eval-base"))) == {"model", "eval"}
    assert set(experiment.relevant_settings(experiment.step("starter"))) == {"model"}


def test_the_full_size_has_the_paper_s_tasks() -> None:
    from meteora_core.data.tasks import TASK_ORDER

    tasks = load_experiment("full").values["tasks"].split(",")
    assert len(tasks) == 25
    assert set(TASK_ORDER) - set(tasks) == {"cnn_dailymail", "news_commentary_es", "news_commentary_it"}
    assert tasks == [task for task in TASK_ORDER if task in tasks]


def test_settings_are_written_as_toml() -> None:
    settings = {"model": {"base": 'a "b"', "dtype": "auto"}, "train": {"steps": 3, "rate": 1e-4, "on": True, "tasks": {"gsm8k": {"steps": 5}}}}
    assert tomllib.loads(settings_text(settings)) == settings


def test_mistakes_in_a_sizes_file(tmp_path) -> None:
    with pytest.raises(UsageError, match="no sizes file nothing"):
        load_experiment("nothing")
    (tmp_path / "broken.toml").write_text("a = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_experiment(tmp_path / "broken.toml")
    text = (HERE / "toy.toml").read_text()
    (tmp_path / "short.toml").write_text(text.replace("gate_rows = 4\n", ""))
    engine = Engine(load_experiment(tmp_path / "short.toml"), "x", Fake(), lambda line: None)
    with pytest.raises(UsageError, match=r"nothing fills .gate_rows."):
        engine.command_line(engine.experiment.step("gates-ridge"))


def test_adapters_are_trained_in_parts_that_make_the_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("toy")
    assert set(experiment.step("gates-ridge").needs) == {f"adapters-{part}" for part in range(1, PARTS + 1)}
    tasks = sorted(experiment.values["tasks"].split(","))
    for task in tasks:
        (experiment.data / task).mkdir(parents=True)
        (experiment.data / task / "train.jsonl").write_text("{}\n")
    engine = Engine(experiment, "x", Fake(), lambda line: None)
    parts = [experiment.step(name) for name in experiment.step("gates-ridge").needs]
    trained = [step.arguments(engine.values())[step.arguments(engine.values()).index("--task") + 1].split(",") for step in parts]
    assert sorted(task for part in trained for task in part) == tasks
    assert max(map(len, trained)) - min(map(len, trained)) <= 1
    assert sorted(path.name for step in parts for path in engine.makes(step)) == tasks
    for step, part in zip(parts, trained, strict=True):
        assert [task for task in tasks if engine.uses(step, task)] == sorted(part)


def test_fewer_tasks_than_parts_have_fewer_commands(tmp_path) -> None:
    toy = (HERE / "toy.toml").read_text()
    tasks = next(line for line in toy.splitlines() if line.startswith("tasks = "))
    (tmp_path / "two.toml").write_text(toy.replace(tasks, 'tasks = "gsm8k,strategyqa"'))
    experiment = load_experiment(tmp_path / "two.toml")
    assert [step.name for step in experiment.steps if step.name.startswith("adapters-")] == ["adapters-1", "adapters-2"]
    assert experiment.step("gates-ridge").needs == ("adapters-1", "adapters-2")
