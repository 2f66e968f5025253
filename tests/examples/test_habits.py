"""The scripts and the notebook of examples/habits run as they are, with a tiny base model."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from meteora_core import load_checkpoint
from meteora_core.checkpoints.native import read_config
from support.chat_world import byte_llama, byte_tokenizer, write_adapter

HABITS = Path(__file__).parents[2] / "examples" / "habits"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL asks transformers 5.23 by the old name
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, two adapters and their rows."""
    folder = tmp_path_factory.mktemp("habits")
    model = byte_llama()
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, (name, text) in enumerate((("one", "abcabc"), ("two", "xyzzyx"))):
        write_adapter(folder / "adapters" / name, model, folder / "base", seed)
        (folder / "datasets" / name).mkdir(parents=True)
        rows = [{"prompt": f"{text} {number}", "response": text} for number in range(8)]
        (folder / "datasets" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    importlib.import_module(f"examples.habits.{script}").main()


@pytest.mark.parametrize("script", ["train_with_trainer", "train_with_sft_trainer"])
def test_scripts_that_train_write_a_checkpoint_that_loads(script: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if "sft" in script:
        pytest.importorskip("trl")
    run(script, place, monkeypatch, "--base", str(place / "base"), "--steps", "10", "--out", f"runs/{script}")
    assert "gate accuracy" in capsys.readouterr().out
    assert read_config(place / "runs" / script)["gates"] == "trained"
    assert load_checkpoint(place / "runs" / script).meteora.names == ("one", "two")


def test_the_pipeline_answers_with_every_choice_of_adapters(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from meteora_core import AdapterBank, attach, save_checkpoint
    from meteora_core.model.base import BaseReference, load_base

    bank = AdapterBank.from_peft({name: place / "adapters" / name for name in ("one", "two")})
    save_checkpoint(attach(load_base(BaseReference(str(place / "base"))), bank, init="arrow"), place / "runs" / "mine")
    run("generate_with_pipeline", place, monkeypatch, "--checkpoint", "runs/mine", "--prompt", "Hello", "--tokens", "5")
    answers = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ": '" in line or ': "' in line]
    assert answers == ["gates", "one", "two", "0.7 one + 0.3 two", "base model"]


def test_the_notebook_runs_from_the_first_cell_to_the_last(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METEORA_NOTEBOOK_BASE", str(tmp_path / "base"))
    monkeypatch.setenv("METEORA_NOTEBOOK_STEPS", "3")
    notebook = json.loads((HABITS / "own_adapters.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, source in enumerate(cells):
        exec(compile(source, f"own_adapters.ipynb, cell {number}", "exec"), namespace)
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert {"greeting", "order"} <= set(namespace["done"].adapters)
    assert "</html>" in (tmp_path / "routing.html").read_text(encoding="utf-8")
    assert "routing.html: " in capsys.readouterr().out
