"""Prompt frames: those of adapters are recorded in checkpoints, and training chooses a common one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meteora_core import AdapterBank, load_checkpoint
from meteora_core.adapters.folders import folder_frame
from meteora_core.checkpoints.inspect import inspect_checkpoint
from meteora_core.data.dataset_frames import dataset_frame, row_end
from meteora_core.data.formats.reading import Reading
from meteora_core.data.frames import INST, RAW, Frame
from meteora_core.data.userdata import add_task, own_task
from meteora_core.errors import UsageError
from meteora_core.model.base import BaseReference
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings
from meteora_core.training.encoding import encode_rows
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.single_adapter import train_adapter
from meteora_core.training.task_rows import train_rows
from support.commands import restored_tasks
from support.tiny_training import letters, model

FRAMES = {"shout": "Q: {}\nA:", "count": "<{}>\n"}


@pytest.fixture(autouse=True)
def known_tasks() -> Any:
    with restored_tasks():
        yield


def datasets(folder: Path, frames: dict[str, str]) -> Path:
    """Two tasks with frames of their own."""
    rows = {"shout": lambda i: (f"say {chr(97 + i % 26)}", chr(65 + i % 26) * 3), "count": lambda i: (f"{i % 9} +1?", str(i % 9 + 1))}
    for name, frame in frames.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = [dict(zip(("question", "answer"), rows[name](i), strict=True)) for i in range(60)]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        add_task(own_task(name, train=path, reading=Reading(template=frame)), folder / "datasets")
    return folder / "datasets"


def trained(folder: Path, frames: dict[str, str], notes: list[str] | None = None, template: str | None = None) -> Path:
    data = datasets(folder, frames)

    class Notes:
        def __getattr__(self, name: str) -> Any:
            from meteora_core.progress import SILENT

            return getattr(SILENT, name)

        def note(self, message: str) -> None:
            if notes is not None:
                notes.append(message)

    base = BaseReference("tiny")
    for name in frames:
        settings = AdapterTrainSettings(max_steps=1, batch_size=2, rank=2, log_steps=1)
        train_adapter(model(), letters(), name, settings, TrainJob(base, data, folder / "adapters"))
    bank = AdapterBank.from_peft({name: folder / "adapters" / name for name in frames})
    settings = GateTrainSettings(max_steps=0, batch_size=4, init="ridge", ridge_tokens=2000)
    job = TrainJob(base, data, folder / "run", template=template, progress=Notes())  # type: ignore[arg-type]
    return train_gates(model(), letters(), bank, settings, job).folder


def test_one_frame_for_all_is_taken(tmp_path: Path) -> None:
    frames = dict.fromkeys(FRAMES, "Q: {}\nA:")
    folder = trained(tmp_path, frames)
    loaded = load_checkpoint(folder, model())
    assert loaded.meteora.provenance.frame == Frame("Q: ", "\nA:")
    assert [info.frame for info in loaded.meteora.adapters] == [Frame("Q: ", "\nA:")] * 2
    facts = inspect_checkpoint(folder)
    assert facts["frame"] == {"before": "Q: ", "after": "\nA:"}
    assert folder_frame(tmp_path / "adapters" / "shout") == Frame("Q: ", "\nA:")


def test_of_several_frames_the_one_with_the_best_routing_is_chosen_and_reported(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = trained(tmp_path, FRAMES, notes)
    facts = inspect_checkpoint(folder)
    tried = facts["training"]["frames"]
    assert set(tried) == set(FRAMES.values())
    chosen = facts["frame"]["before"] + "{}" + facts["frame"]["after"]
    assert tried[chosen] == max(tried.values())
    assert [adapter["frame"]["before"] for adapter in facts["adapters"]] == ["Q: ", "<"]
    said = [note for note in notes if "2 different prompt templates" in note]
    assert len(said) == 1
    assert repr(chosen) in said[0]


def test_the_users_frame_has_precedence(tmp_path: Path) -> None:
    folder = trained(tmp_path, FRAMES, template="inst")
    assert load_checkpoint(folder, model()).meteora.provenance.frame == INST
    with pytest.raises(UsageError, match="unknown template 'x'"):
        trained(tmp_path / "other", FRAMES, template="x")


def test_a_checkpoint_of_an_earlier_version_has_the_frame_of_that_version(tmp_path: Path) -> None:
    folder = trained(tmp_path, dict.fromkeys(FRAMES, "Q: {}\nA:"))
    file = folder / "meteora_config.json"
    config = json.loads(file.read_text())
    config.pop("frame")
    for adapter in config["adapters"]:
        del adapter["frame"]
    file.write_text(json.dumps(config))
    loaded = load_checkpoint(folder, model())
    assert loaded.meteora.provenance.frame == INST
    assert [info.frame for info in loaded.meteora.adapters] == [None, None]


def test_the_frame_of_a_dataset(tmp_path: Path) -> None:
    data = datasets(tmp_path, FRAMES)
    assert dataset_frame(data, "shout") == Frame("Q: ", "\nA:")
    assert dataset_frame(data, "none") is None
    for name, prompts in {"gsm8k": ["a", "b"], "hand": ["### A\n1\n### B\n", "### A\n2\n### B\n"], "bare": ["x", "y"]}.items():
        (data / name).mkdir()
        (data / name / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt, "response": "r"}) + "\n" for prompt in prompts))
    assert dataset_frame(data, "gsm8k") == INST
    assert dataset_frame(data, "hand") == Frame("### A\n", "\n### B\n")
    assert dataset_frame(data, "bare") == RAW


def test_a_chat_template_in_an_adapters_folder_is_its_frame(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert folder_frame(folder) is None
    tokenizer = letters()
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    tokenizer.save_pretrained(folder)
    assert folder_frame(folder) == Frame("<", ">", chat=True)
    (folder / "tokenizer.json").write_text("broken")
    assert folder_frame(folder) is None


def test_rows_end_with_the_frames_own_token(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}<|end|>{% endfor %}"
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' * 20)
    add_task(own_task("mine", train=path, reading=Reading(tokenizer=lambda: tokenizer)), tmp_path)
    end = row_end(tmp_path, "mine", tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<|end|>")
    rows, _ = train_rows(TrainJob(BaseReference("tiny"), tmp_path, tmp_path), "mine", 0)
    assert {row.tokens[-1] for row in encode_rows(rows, tokenizer, 0, 100, end).rows} == {end}
    assert {row.tokens[-1] for row in encode_rows(rows, tokenizer, 0, 100).rows} == {tokenizer.eos_token_id}
