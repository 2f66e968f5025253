"""Steps of the experiment side by side: real processes whose ``meteora`` is a script that sleeps, meets others, fails or does not listen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from examples.paper import children
from examples.paper.__main__ import call_of, parser
from examples.paper.engine import Engine, Stopped
from examples.paper.plan import Experiment, Step, load_experiment
from examples.paper.report import clock_seconds, commands
from examples.paper.side_by_side import run_side_by_side, tail
from meteora_core.errors import MeteoraError

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import json, os, pathlib, signal, sys, time

name = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).name if "--out" in sys.argv else sys.argv[3]
todo = json.loads(pathlib.Path("todo.json").read_text()).get(name, {})
if todo.get("deaf"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def note(sign):
    with open("events", "a") as handle:
        handle.write(f"{sign} {name} {os.getpid()}\\n")

pathlib.Path(f"gpu-{name}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))

def begun():
    return [line.split()[1] for line in open("events") if line[0] == "+"]

note("+")
try:
    print(todo.get("text", ""))
    until = time.monotonic() + 600
    while not set(todo.get("meet", ())) <= set(begun()):
        if time.monotonic() > until:
            sys.exit("nobody came")
        time.sleep(0.02)
    time.sleep(todo.get("sleep", 0) if begun().count(name) == 1 else 0)
    if "--out" in sys.argv and not todo.get("code"):
        folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meteora.safetensors").write_text(name)
finally:
    note("-")
sys.exit(todo.get("code", 0))
"""


class World:
    """A folder with the script, what it is to do for each step, and an engine over some steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        (folder / "meteora_cli.py").write_text(SCRIPT)
        (folder / "events").touch()

    def engine(self, jobs: int, *steps: Step, seconds: float = 600.0, deadline: float = float("inf"), **todo: dict[str, object]) -> Engine:
        """An engine over the steps; ``todo`` says what the script does for each."""
        (self.folder / "todo.json").write_text(json.dumps(todo))
        values = {"work": "w", "rank": 8, "base": "x"}
        experiment = Experiment(steps, values, {"model": {"base": "x"}}, {}, {}, self.folder / "docs", seconds, "test")
        return Engine(experiment, "run-it", children.run_child, self.said.append, deadline, jobs=jobs)

    def events(self) -> list[str]:
        """``+a``, ``-a``: which commands began and ended, in order."""
        return ["".join(line.split()[:2]) for line in (self.folder / "events").read_text().splitlines()]

    def wait_for(self, count: int) -> None:
        """Until so many commands have begun."""
        until = time.monotonic() + 600
        while len(self.events()) < count:
            assert time.monotonic() < until, "they do not begin"
            time.sleep(0.02)

    def alive(self) -> list[int]:
        """The commands' processes that are still there."""
        return [pid for line in (self.folder / "events").read_text().splitlines() if (pid := int(line.split()[2])) and Path(f"/proc/{pid}").exists()]


def step(name: str, *needs: str, weight: int = 1) -> Step:
    return Step(name, "some", f"train --out {{work}}/{name}", needs, (f"{{work}}/{name}",), weight=weight)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = World(tmp_path)
    yield made
    for pid in made.alive():
        os.kill(pid, signal.SIGKILL)


def test_ready_steps_run_at_the_same_time_and_are_recorded(world) -> None:
    engine = world.engine(2, step("a"), step("b"), step("c", "a", "b"), a={"meet": ["b"], "text": "hello"}, b={"meet": ["a"]})
    assert sorted(run_side_by_side(engine)) == ["a", "b", "c"]
    assert world.events()[-2:] == ["+c", "-c"]
    record = json.loads(engine.record_file(engine.experiment.step("a")).read_text())
    assert record["jobs"] == 2
    assert record["parts"] == len(record["spans"]) == 1
    assert set(record) == {"step", "command", "settings", "seconds", "parts", "data", "outputs", "jobs", "spans"}
    assert (world.folder / "w/logs/a.log").read_text() == "$ meteora --config w/meteora.toml train --out w/a\nhello\n"
    assert [line.split()[:2] for line in world.said[:2]] == [["+", "a:"], ["+", "b:"]]
    assert sorted(line.split(" in ")[0] for line in world.said if line.startswith("-")) == ["- a: done", "- b: done", "- c: done"]
    assert run_side_by_side(engine) == []
    engine.record_file(engine.experiment.step("a")).unlink()
    assert run_side_by_side(engine) == ["a"]
    (world.folder / "w/a/meteora.safetensors").unlink()
    with pytest.raises(MeteoraError, match="which step a created, no longer exists"):
        run_side_by_side(engine)


def test_a_step_takes_as_many_places_as_its_weight(world) -> None:
    steps = (step("light"), step("heavy", weight=2), step("other"), step("huge", weight=9), step("last"))
    engine = world.engine(2, *steps, light={"meet": ["other"]})
    assert sorted(run_side_by_side(engine)) == sorted(each.name for each in steps)
    taken, running = [], set()
    weights = {"light": 1, "heavy": 2, "other": 1, "huge": 2, "last": 1}
    for event in world.events():
        running = running | {event[1:]} if event[0] == "+" else running - {event[1:]}
        taken.append(sum(weights[name] for name in running))
    assert max(taken) == 2
    assert [event for event in world.events() if event[0] == "+"].index("+heavy") >= 2, "what fits overtakes"


def test_after_a_failure_none_begins_and_the_others_end(world) -> None:
    engine = world.engine(
        2,
        *(step("a"), step("b"), step("c")),
        a={"meet": ["b"], "code": 3, "text": "\n".join(f"line {number}" for number in range(30))},
        b={"meet": ["a"], "sleep": 0.5},
    )
    with pytest.raises(MeteoraError, match="step a failed with exit code 3") as caught:
        run_side_by_side(engine)
    assert caught.value.hint == "fix the error above, then run: run-it"
    assert world.events()[-1] == "-b"
    assert "+c" not in world.events()
    assert not engine.is_done(engine.experiment.step("a"))
    assert engine.is_done(engine.experiment.step("b"))
    shown = next(line for line in world.said if line.startswith("- a: failed")).splitlines()
    assert shown[0].endswith("the end of w/logs/a.log:")
    assert shown[1:] == [f"    line {number}" for number in range(15, 30)]
    assert world.alive() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_keep_going_runs_what_does_not_need_the_failed_step(world, jobs: int) -> None:
    engine = world.engine(jobs, step("a"), step("b", "a"), step("c", "b"), step("d"), step("e", "d"), a={"code": 3}, e={"code": 4})
    engine.keep_going = True
    with pytest.raises(MeteoraError, match="step a failed with exit code 3"):
        engine.run() if jobs == 1 else run_side_by_side(engine)
    assert sorted(world.events()) == ["+a", "+d", "+e", "-a", "-d", "-e"]
    assert [name for name in "abcde" if engine.record_file(engine.experiment.step(name)).is_file()] == ["d"]


def test_a_need_that_is_neither_chosen_nor_done_is_found_before_anything_starts(world) -> None:
    engine = world.engine(2, step("a"), step("b"), step("c", "a"))
    with pytest.raises(MeteoraError, match="step c needs step a, which is not done") as caught:
        run_side_by_side(engine, ["b", "c"])
    assert caught.value.hint == "run-it --only a"
    assert world.events() == []


def test_when_the_time_of_the_call_is_over_all_are_ended_even_those_that_do_not_listen(world, monkeypatch) -> None:
    monkeypatch.setattr(children, "GRACE", 0.3)
    engine = world.engine(2, step("a"), step("b"), step("c"), deadline=time.monotonic() + 1.5, a={"sleep": 600}, b={"sleep": 600, "deaf": True})
    with pytest.raises(Stopped):
        run_side_by_side(engine)
    assert world.alive() == []
    assert "+c" not in world.events()
    parts = json.loads((world.folder / "w/steps/b.parts.json").read_text())
    assert (parts["parts"], len(parts["spans"]), parts["jobs"]) == (1, 1, 2)
    assert not engine.record_file(engine.experiment.step("a")).exists()
    (world.folder / "todo.json").write_text("{}")
    engine.deadline, engine.jobs = float("inf"), 1
    assert engine.run() == ["a", "b", "c"]
    record = json.loads(engine.record_file(engine.experiment.step("b")).read_text())
    assert (record["parts"], len(record["spans"]), record["jobs"]) == (2, 2, 2), "part of it ran side by side"


def test_a_command_over_its_limit_goes_on_in_another_part(world) -> None:
    engine = world.engine(2, step("a"), step("b"), seconds=3, a={"sleep": 600})
    assert sorted(run_side_by_side(engine)) == ["a", "b"]
    parts = json.loads(engine.record_file(engine.experiment.step("a")).read_text())["parts"]
    assert parts >= 2
    assert (world.folder / "w/logs/a.log").read_text().count("$ meteora") == parts
    assert sum(line.startswith("+ a:") for line in world.said) == parts
    assert any(line.startswith("- a: stopped after") for line in world.said)


@pytest.mark.parametrize(("jobs", "sign", "code"), [(2, signal.SIGINT, 130), (2, signal.SIGTERM, 143), (1, signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_and_all_its_commands(world, jobs, sign, code) -> None:
    world.engine(2, download={"sleep": 600}, build={"sleep": 600})
    script = world.folder / "meteora_cli.py"
    script.write_text(SCRIPT.replace("sys.argv[3]", "sys.argv[4]"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    call = [sys.executable, "-m", "examples.paper", "toy", "--work", "w", "--only", "base", "data", "--jobs", str(jobs)]
    program = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        world.wait_for(jobs)
        program.send_signal(sign)
        said = program.communicate(timeout=600)[1]
    finally:
        program.kill()
        program.wait()
    assert program.returncode == code, said
    assert len(world.events()) == 2 * jobs
    assert world.alive() == []
    assert not list((world.folder / "w").glob("steps/*.json"))


def test_a_second_signal_kills_what_does_not_end(world) -> None:
    world.engine(1, a={"sleep": 60, "deaf": True})
    child = children.start_child(["x", "y", "--out", "w/a"], world.folder / "log")
    world.wait_for(1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        children.end_children([child])
    assert child.returncode == -signal.SIGKILL


def test_signals_within_the_start_of_a_process_are_held() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), children.signals_held():
        signal.raise_signal(signal.SIGINT)
        seen.append("after it")
    assert seen == ["after it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_progress_bar_is_one_line_of_the_tail(tmp_path) -> None:
    (tmp_path / "log").write_bytes("one\n 10%\r 50%\r 90%\r\ntwo \xe4\n".encode("latin-1"))
    assert tail(tmp_path / "log", 2) == ["     90%", "    two �"]


def test_training_takes_two_places_and_nothing_reads_what_another_writes() -> None:
    experiment = load_experiment("full")
    heavy = {each.name for each in experiment.steps if each.weight == 2}
    assert heavy == {
        *(f"adapters-{part}" for part in (1, 2, 3, 4)),
        "lora-b",
        *(f"gates-{name}" for name in ("ridge", "normal", "arrow", "joint", "ridge-seed2")),
        *(f"routers-phatgoose{end}" for end in ("", "-without", "-seed2", "-without-seed2")),
    }
    assert {each.name for each in experiment.steps if each.weight == 3} == {
        "eval-peft-arrow",
        *(f"routers-arrow{end}" for end in ("", "-without", "-seed2", "-without-seed2")),
    }
    largest = {"gates-composites", "gates-composites-fixed", "gates-composites-seed2", "gates-joined"}
    assert {each.name for each in experiment.steps if each.weight == 4} == largest
    assert {each.weight for each in experiment.steps} == {1, 2, 3, 4}

    def before(name: str) -> set[str]:
        needs = experiment.step(name).needs
        return set(needs).union(*(before(need) for need in needs))

    for each in experiment.steps:
        if each.command.startswith(("train", "eval")):
            assert {"data", "data-hub"} <= before(each.name), "the list of tasks must not change while it is read"
            assert "base" in before(each.name)


def test_jobs_are_part_of_the_call_that_a_repair_names(capsys) -> None:
    assert call_of(parser().parse_args(["toy", "--jobs", "3"])) == "python -m examples.paper toy --jobs 3"
    assert call_of(parser().parse_args(["toy"])) == "python -m examples.paper toy"
    from examples.paper.__main__ import main

    with pytest.raises(SystemExit):
        main(["toy", "--jobs", "0"])
    assert "--jobs must be 1 or more" in capsys.readouterr().err


def test_commands_are_spread_over_gpus_by_weight(world, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    meet = {name: {"meet": ["a", "b", "c"]} for name in "abc"}
    engine = world.engine(9, step("a", weight=2), step("b"), step("c"), step("d", "a", "b", "c"), **meet)
    engine.gpus = ("4", "7")
    run_side_by_side(engine)
    assert [(world.folder / f"gpu-{name}").read_text() for name in "abcd"] == ["4", "7", "7", "4"]
    record = json.loads(engine.record_file(engine.experiment.step("a")).read_text())
    assert record["gpus"] == 2
    assert "ran side by side on 2 GPUs, so" in commands(engine)
    engine.gpus = ("4",)
    engine.record_file(engine.experiment.step("d")).unlink()
    run_side_by_side(engine)
    assert (world.folder / "gpu-d").read_text() == "4,7", "with one GPU nothing is chosen"


def test_visible_gpus_are_those_of_the_environment(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert children.visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc, 3,9")
    assert children.visible_gpus() == ("GPU-abc", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert children.visible_gpus() == ()


def test_the_report_says_that_commands_ran_side_by_side(world) -> None:
    engine = world.engine(1, step("a"), step("b"))
    spans = {"a": [(0, 60), (100, 160)], "b": [(30, 120)]}
    folder = world.folder / "w/steps"
    folder.mkdir(parents=True)
    for jobs, end in (
        (1, "In all 3.5 minutes."),
        (3, "Up to 3 commands ran side by side, so these seconds are not what each takes alone; by the clock it was 2.7 minutes"),
    ):
        for name, pairs in spans.items():
            seconds = sum(ended - began for began, ended in pairs)
            kept = [{"began": began, "ended": ended} for began, ended in pairs]
            record = {"command": name, "seconds": seconds, "parts": len(pairs), "jobs": jobs if name == "a" else 1, "spans": kept}
            (folder / f"{name}.json").write_text(json.dumps(record))
        assert end in commands(engine)
    assert "side by side" not in commands(engine) or jobs == 3
    assert clock_seconds([{"parts": 1, "spans": [{"began": 0, "ended": 5}]}, {"parts": 1, "spans": [{"began": 9, "ended": 10}]}]) == 6
    assert clock_seconds([{"parts": 2, "spans": [{"began": 0, "ended": 5}]}]) is None
    (folder / "b.json").write_text(json.dumps({"command": "b", "seconds": 90.0, "parts": 1}))
    assert commands(engine).endswith("so these seconds are not what each takes alone.")
