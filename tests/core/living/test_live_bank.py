"""Adapters join and leave a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_core import load_checkpoint
from meteora_core.checkpoints.gate_statistics import Recipe, read_statistics
from meteora_core.errors import AdapterError, DataError, MeteoraError, UsageError
from meteora_core.living.collector import Collector
from meteora_core.living.live_bank import LiveBank, corrected, mean_accuracy
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference
from meteora_core.training.statistics import Collecting
from support.adapter_files import lora_tensors, write_adapter
from support.living_folder import NAMES, rows_of, write_jsonl_rows
from support.tiny_training import IDS, letters


@pytest.fixture
def live(world: Path, routed: Path, tmp_path: Path) -> LiveBank:
    """The bank of count, shout and spell, on a loaded model."""
    tokenizer = letters()
    how = Collecting(BaseReference(str(world / "base")), pad_token=1, recipe=Recipe(answer_share=0.8))
    collector = Collector(tokenizer, how, tmp_path / "statistics", lambda name, folder: find_rows(name, world / "datasets", folder, tokenizer))
    model = load_checkpoint(routed, device="cpu")
    return LiveBank(model, collector, read_statistics(routed, NAMES))


def logits(live: LiveBank) -> torch.Tensor:
    with torch.no_grad():
        return live.model(IDS).logits


def test_a_loaded_model_gains_an_adapter_and_loses_it_again(world, live) -> None:
    before, identity = logits(live), live.model
    live.model.meteora.temperature = 2.0
    change = live.add("sum", world / "adapters" / "sum")
    assert (change.adapters, live.names, change.exact) == (NAMES, NAMES, True)
    assert live.model is identity
    assert live.model.meteora.temperature == 2.0
    assert not torch.equal(logits(live), before)
    live.model.meteora.temperature = 1.0
    assert live.drop("sum").gates == "solved"
    assert torch.equal(logits(live), before)
    assert sorted(live.statistics) == list(NAMES[:3])


def test_held_out_rows_are_limited_for_each_adapter_and_for_all_together(live, monkeypatch) -> None:
    everything = live.collector.held_out(["count", "shout"]).rows
    assert [len(rows) for rows in everything] == [3, 3]  # a tenth of the rows; none of the limits is reached
    monkeypatch.setattr("meteora_core.living.collector.ALL_HELD_OUT_TOKENS", 60)
    *some, none = live.collector.held_out(["count", "shout", "no_adapter"]).rows
    assert none == []
    for rows, complete in zip(some, everything, strict=True):
        assert rows == complete[: len(rows)]
        assert len(rows) < 3
        assert sum(map(len, rows[:-1])) < 30 <= sum(map(len, rows))


def test_an_adapter_is_updated_twice_and_back(world, live, tmp_path) -> None:
    before = logits(live)
    new = write_adapter(tmp_path / "shout", lora_tensors(60))
    write_jsonl_rows(tmp_path / "shout.jsonl", rows_of("shout"))
    live.update("shout", new)
    changed = logits(live)
    assert not torch.equal(changed, before)
    live.update("shout", world / "adapters" / "shout")
    assert torch.equal(logits(live), before)
    live.update("shout", new)
    assert torch.equal(logits(live), changed)


def test_a_change_that_fails_leaves_the_model_as_it_was(world, live, tmp_path) -> None:
    before, statistics = logits(live), dict(live.statistics)
    gates = {path: layer.gate.detach().clone() for path, layer in meteora_layers(live.model)}
    broken = write_adapter(tmp_path / "broken", lora_tensors(61))
    write_jsonl_rows(tmp_path / "broken.jsonl", [{"prompt": "x"}])
    rowless = write_adapter(tmp_path / "rowless", lora_tensors(62))
    wide = write_adapter(tmp_path / "wide", {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in lora_tensors(63).items()})
    for act, kind in (
        (lambda: live.add("shout", world / "adapters" / "shout"), UsageError),
        (lambda: live.add("broken", broken), DataError),
        (lambda: live.add("rowless", rowless), MeteoraError),
        (lambda: live.add("wide", wide), AdapterError),
        (lambda: live.update("shout", wide), AdapterError),
        (lambda: live.drop("nobody"), UsageError),
    ):
        with pytest.raises(kind):
            act()
        assert live.names == NAMES[:3]
        assert torch.equal(logits(live), before)
        assert live.statistics == statistics
        assert live.model.meteora.gates == "closed form"
    assert all(torch.equal(gates[path], layer.gate) for path, layer in meteora_layers(live.model))
    live.add("sum", world / "adapters" / "sum")  # nothing of the failures is left in the way


def test_the_correction_stays_with_the_rows_of_the_old_adapters() -> None:
    gates = {"q": torch.zeros(3, 2), "new": torch.ones(3, 2)}
    made = corrected(gates, {"q": torch.tensor([[2.0, 4.0], [6.0, 8.0]])}, ("a", "c", "b"), ("a", "b"), 0.5)
    assert made["q"].tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]
    assert torch.equal(made["new"], gates["new"])
    assert gates["q"].sum() == 0


def test_an_adapter_with_many_answer_tokens_does_not_outweigh_the_others() -> None:
    measured = {"gate_accuracy": 0.7, "gate_accuracy/a": 0.9, "gate_accuracy/b": 0.5, "gate_accuracy_all": 0.2}
    assert mean_accuracy(measured, ("a", "b", "c")) == pytest.approx(0.7)
    assert mean_accuracy(measured, ("b",)) == 0.5
    assert mean_accuracy({}, ("a",)) == 0.0


def test_training_that_helped_is_kept(world, live) -> None:
    """A correction that points to the right adapters more strongly than the closed form does."""
    with torch.no_grad():
        for _, layer in meteora_layers(live.model):
            layer.gate.mul_(1.0001)
    live.model.meteora.gates = "trained"
    change = live.add("sum", world / "adapters" / "sum")
    assert change.correction in (0.0, 0.5, 1.0)
    assert live.model.meteora.gates == ("trained" if change.correction else "closed form")
    assert change.held_out["gate_accuracy"] > 0.4
