"""The paper's experiment at toy size on a tiny base: killed, resumed, repaired, reported."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from examples.paper.__main__ import main
from support import processes
from support.paper_world import InProcess, experiment, make_base, make_raw

PLACES = ("--work", "runs/toy", "--docs", "docs", "--raw-dir", "raw", "--base", "base", "--device", "cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a base and raw rows."""
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    make_raw(tmp_path / "raw")
    return tmp_path


def commands(ran: InProcess) -> list[str]:
    """The steps' commands without their checks."""
    return [" ".join(arguments[2:4]) for arguments in ran.ran if arguments[2:4] != ["data", "verify"]]


def test_it_stops_goes_on_and_repairs(place, monkeypatch, capsys) -> None:
    class Dying(InProcess):
        """The gates' training is killed in the middle: its states are there, its checkpoint is not."""

        died = False

        def __call__(self, arguments, seconds):
            if "gates/ridge" in " ".join(arguments) and "train" in arguments and not self.died:
                self.died = True
                monkeypatch.setattr("meteora_core.training.gates.save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
                with contextlib.suppress(KeyboardInterrupt):
                    super().__call__(arguments, seconds)
                monkeypatch.undo()
                monkeypatch.chdir(place)
                raise KeyboardInterrupt
            return super().__call__(arguments, seconds)

    dying = Dying(monkeypatch)
    assert main(["toy", *PLACES, "--only", "datasets"], run_command=dying) == 0
    assert main(["toy", *PLACES, "--only", "eval-ridge"], run_command=dying) == 1
    said = capsys.readouterr().err
    assert "step eval-ridge needs step gates-ridge, which is not done" in said
    assert "repair: python -m examples.paper toy --raw-dir raw --work runs/toy --docs docs --base base --device cpu --only gates-ridge" in said
    assert main(["toy", *PLACES, "--only", "adapters-*", "gates-ridge"], run_command=dying) == 130
    assert dying.died
    assert not (place / "runs/toy/gates/ridge").exists()

    ran = InProcess(monkeypatch)
    assert main(["toy", *PLACES, "--only", "datasets", "adapters-*", "gates-ridge", "eval-ridge"], run_command=ran) == 0
    assert commands(ran) == ["train --out", "eval --task"]
    again = InProcess(monkeypatch)
    assert main(["toy", *PLACES, "--only", "datasets", "adapters-*", "gates-ridge", "eval-ridge"], run_command=again) == 0
    assert commands(again) == []

    rows = place / "runs/toy/datasets/gsm8k/train.jsonl"
    kept = rows.read_bytes()
    rows.write_bytes(kept + b"\n")
    capsys.readouterr()
    assert main(["toy", *PLACES, "--only", "eval-ridge"], run_command=again) == 1
    said = capsys.readouterr().err
    assert "datasets differ from what was built" in said
    assert said.strip().endswith("--again data")
    rows.write_bytes(kept)

    manifest = rows.with_name("manifest.json")
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 1 '))
    assert main(["toy", *PLACES, "--only", "eval-ridge"], run_command=again) == 1
    assert "used other rows of gsm8k" in capsys.readouterr().err
    manifest.write_text(text)

    config = place / "runs/toy/gates/ridge/meteora_config.json"
    saved = config.read_text()
    other = json.loads(saved)
    other["base"]["name"] = "another"
    config.write_text(json.dumps(other))
    assert main(["toy", *PLACES, "--again", "eval-ridge", "--only", "eval-ridge"], run_command=again) == 1
    assert "is not the file that step gates-ridge created" in capsys.readouterr().err
    record = place / "runs/toy/steps/gates-ridge.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "outputs": {}}))
    assert main(["toy", *PLACES, "--only", "eval-ridge"], run_command=again) == 1
    said = capsys.readouterr().err
    assert "the checkpoint runs/toy/gates/ridge belongs to the base another, not to base" in said
    assert said.strip().endswith("--again gates-ridge")


@pytest.mark.slow
def test_the_whole_experiment_and_its_report(place, monkeypatch) -> None:
    ran = InProcess(monkeypatch)
    assert main(["toy", *PLACES], run_command=ran) == 0
    page = (place / "docs" / "paper.md").read_text()
    for heading in ("Overview", "The paper's claims", "Single tasks", "Composites", "Routing", "Commands"):
        assert f"## {heading}" in page
    assert "These are toy sizes" in page
    assert "Not run" not in page
    assert page.count("meteora --config") == len(commands(ran))
    results = place / "docs"
    assert {file.name for file in results.glob("*.png")} >= {"singles.png", "composites.png", "gate_accuracy_by_layer.png", "heat_map_meteora.png"}
    document = json.loads((results / "meteora.json").read_text())
    assert "own_top1_by_layer" not in document["meteora"]["routing"]["gsm8k"]
    assert set(document["meteora"]["routing"]["gsm8k"]["own_top1_by_decoder_layer"]) == {"0", "1"}
    assert sum(file.stat().st_size for file in results.glob("*.json")) < 1e6
    card = (place / "runs/toy/starter/README.md").read_text()
    assert "| composite_10 | attempted |" in card
    assert len(json.loads((place / "runs/toy/starter/meteora_config.json").read_text())["adapters"]) == 10


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(place) -> None:
    call = ("toy", *PLACES, "--only", "datasets", "adapters-*", "gates-ridge", "eval-base")
    child = processes.start(experiment, *call, folder=place)
    record = place / "runs/toy/steps/adapters-4.json"
    while not record.exists() and not child.ended:
        time.sleep(0.1)
    assert not child.ended, "the run ended before it could be killed"
    child.kill()
    before = record.stat().st_mtime_ns
    short = processes.run(experiment, *call, "--for", "0", folder=place)
    assert short.code == 75, short.err
    assert "continue with the same command" in short.err
    done = processes.run(experiment, *call, folder=place)
    assert done.code == 0, done.err[-2000:]
    assert record.stat().st_mtime_ns == before
    assert "train adapters" not in done.out
    assert (place / "runs/toy/eval/base/base").is_dir()
