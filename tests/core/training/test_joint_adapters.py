"""All adapters in one pass equal adapters trained one by one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from meteora_core.errors import UsageError
from meteora_core.training.joint_adapters import train_together
from meteora_core.training.single_adapter import train_adapter
from support.tiny_training import IDS, Killed, held_out_rows, kill_at, letters, model, together_options

TASKS = ("shout", "count")


LISTS = {"list_rows": 0.4, "list_max": 4, "max_length": 100}


@pytest.mark.parametrize("changes", [LISTS, {"together_rows": 4, "accumulation": 2, "loss_on": "response", "gradient_checkpointing": True, "rslora": True}])
def test_together_equals_one_by_one(data, tmp_path, changes) -> None:
    for task in TASKS:
        train_adapter(model(), letters(), task, **together_options(data, tmp_path / "alone", **changes))
    base = model()
    before = base(IDS).logits
    done = train_together(base, letters(), TASKS, **together_options(data, tmp_path / "together", **changes))
    assert [each.task for each in done] == list(TASKS)
    assert torch.equal(base(IDS).logits, before)
    for each in done:
        mine, theirs = (load_file(tmp_path / way / each.task / "adapter_model.safetensors") for way in ("together", "alone"))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
        assert any("lora_B" in name and tensor.abs().max() > 1e-3 for name, tensor in mine.items())
        notes = [json.loads((tmp_path / way / each.task / "meteora_training.json").read_text()) for way in ("together", "alone")]
        assert notes[0]["inputs"] == notes[1]["inputs"]
        assert [entry["loss"] for entry in notes[0]["history"]] == pytest.approx([entry["loss"] for entry in notes[1]["history"]], abs=1e-4)
        configs = [json.loads((tmp_path / way / each.task / "adapter_config.json").read_text()) for way in ("together", "alone")]
        assert {**configs[0], "target_modules": 0} == {**configs[1], "target_modules": 0}
        assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])
    assert not list((tmp_path / "together").glob(".*"))


def test_tasks_may_have_their_own_batch_sizes_and_lengths(data, tmp_path) -> None:
    common = together_options(data, tmp_path / "x")["settings"]
    own = {"count": common.model_copy(update={"batch_size": 2, "accumulation": 3, "max_length": 8})}
    for task in TASKS:
        train_adapter(model(), letters(), task, **{**together_options(data, tmp_path / "alone"), "settings": own.get(task, common)})
    train_together(model(), letters(), TASKS, per_task=own, **together_options(data, tmp_path / "together"))
    for task in TASKS:
        mine, theirs = (load_file(tmp_path / way / task / "adapter_model.safetensors") for way in ("together", "alone"))
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
        assert train_adapter(model(), letters(), task, **{**together_options(data, tmp_path / "together"), "settings": own.get(task, common)}).skipped
    own["count"] = common.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(UsageError, match=r"settings for count\.learning_rate"):
        train_together(model(), letters(), TASKS, per_task=own, **together_options(data, tmp_path / "no"))


def test_finished_adapters_are_kept_and_a_killed_run_resumes(data, tmp_path, monkeypatch) -> None:
    train_together(model(), letters(), TASKS, **together_options(data, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            train_together(model(), letters(), TASKS, **together_options(data, tmp_path / "cut"))
    done = train_together(model(), letters(), TASKS, **together_options(data, tmp_path / "cut"))
    assert not any(each.skipped for each in done)
    for task in TASKS:
        whole, cut = (load_file(tmp_path / way / task / "adapter_model.safetensors") for way in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(each.skipped for each in train_together(model(), letters(), TASKS, **together_options(data, tmp_path / "cut")))
    assert train_adapter(model(), letters(), "count", **together_options(data, tmp_path / "cut")).skipped


def test_held_out_rows_are_measured_by_their_own_adapter(data, tmp_path) -> None:
    held_out_rows(data)
    train_together(model(), letters(), TASKS, **together_options(data, tmp_path, eval_steps=3, learning_rate=5e-2))
    for task in TASKS:
        assert json.loads((tmp_path / task / "meteora_training.json").read_text())["steps"] == 6


def test_packing_cannot_be_combined_with_it(data, tmp_path) -> None:
    with pytest.raises(UsageError, match="--packing"):
        train_together(model(), letters(), TASKS, **together_options(data, tmp_path, packing=True))
