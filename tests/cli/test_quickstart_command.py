"""``meteora quickstart``: the starter checkpoint where one came with the package, training where not or where it is asked for."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from support.evaluation_workspace import TASKS, make_packed


@pytest.fixture
def shipped(tmp_path, make_adapter, monkeypatch) -> Path:
    """As if a starter checkpoint of a tiny base had come with the package."""
    place = make_packed(tmp_path, make_adapter)
    monkeypatch.setattr("meteora_core.starter.starter_checkpoint", lambda: tmp_path / "packed")
    monkeypatch.setenv("METEORA_MODEL__BASE", str(place.base))
    monkeypatch.setenv("METEORA_DATA__SOURCE", "local")
    monkeypatch.setenv("METEORA_DATA__RAW_DIR", str(tmp_path / "raw"))
    return tmp_path / "packed"


class Trained(Exception):
    pass


@pytest.fixture
def no_training(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Trained

    monkeypatch.setattr("meteora_core.quickstart.run_quickstart", refuse)


def test_the_starter_is_shown(meteora, shipped, no_training) -> None:
    sizes = ("quickstart", "--test-rows", "2", "--composite-rows", "1", "--device", "cpu")
    ran = meteora(*sizes)
    assert ran.code == 0, ran.err
    assert "MeteoRA (starter)" in ran.out
    assert "95 % interval" in ran.out
    assert "The answer to a prompt of three tasks" in ran.out
    assert "<strategyqa>" in ran.out or "<question_selection>" in ran.out or "<logical_deduction>" in ran.out  # no colours: adapters are named
    assert all(task in ran.out for task in TASKS)
    assert "saved runs/starter/routing.html" in ran.err
    assert f"meteora chat --checkpoint {shipped}" in ran.err.replace("\n", "")
    again = meteora(*sizes, "--json")
    assert set(again.json["scores"]) == {*TASKS, "three_tasks"}
    assert len(again.json["intervals"]["strategyqa"]["meteora"]["accuracy"]) == 2
    assert set(again.json["answer"]["names"]) == set(TASKS)
    assert again.json["pictures"][0] == "runs/starter/routing.html"


def test_the_commands_to_try_next_work_as_typed(meteora, shipped, no_training, monkeypatch) -> None:
    sizes = ("--test-rows", "2", "--composite-rows", "0", "--device", "cpu")
    ran = meteora("quickstart", *sizes)
    lines = ran.err.replace("\n    ", "\n").split("Try next:")[1].splitlines()
    commands = [shlex.split(line) for line in lines if line.strip().startswith("meteora ")]
    assert [command[1] for command in commands] == ["chat", "eval", "quickstart"]
    monkeypatch.setenv("METEORA_CHAT__MAX_NEW_TOKENS", "4")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Is the sky blue?")))
    assert meteora(*commands[0][1:]).code == 0
    scored = meteora(*commands[1][1:])
    assert scored.code == 0, scored.err
    assert "MeteoRA" in scored.err or "meteora" in scored.out
    with pytest.raises(Trained):
        meteora(*commands[2][1:])


@pytest.mark.parametrize("flags", [("--train",), ("--adapter-steps", "3"), ("--gate-steps", "3")])
def test_training_is_asked_for(meteora, shipped, no_training, flags) -> None:
    with pytest.raises(Trained):
        meteora("quickstart", *flags)


def test_without_a_starter_or_with_another_base_it_trains(meteora, shipped, no_training, monkeypatch) -> None:
    monkeypatch.setenv("METEORA_MODEL__BASE", "another")
    with pytest.raises(Trained):
        meteora("quickstart")
    monkeypatch.undo()
    monkeypatch.setattr("meteora_core.starter.starter_checkpoint", lambda: None)
    monkeypatch.setattr("meteora_core.quickstart.run_quickstart", lambda *_, **__: (_ for _ in ()).throw(Trained))
    with pytest.raises(Trained):
        meteora("quickstart", "--out", "x")
