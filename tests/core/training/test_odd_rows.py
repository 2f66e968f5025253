"""Training on unusual rows: empty answers, a single row, the same row in every task."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from meteora_core import AdapterBank
from meteora_core.model.base import BaseReference
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.single_adapter import train_adapter
from support.tiny_models import make_tiny_llama
from support.tiny_training import letters

BASE = BaseReference("tiny")
ROWS = {
    "one row": [("say a\n", "A")],
    "empty answers": [("say a\n", "")] * 12,
    "empty prompts": [("", "A")] * 12,
    "nothing at all": [("", "")] * 12,
    "the same row": [("say a\n", "A")] * 30,
}


@pytest.mark.parametrize("loss_on", ["response"])
@pytest.mark.parametrize("kind", ROWS)
def test_odd_rows_train_or_are_refused(tmp_path, kind, loss_on) -> None:
    lines = "".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in ROWS[kind])
    for task in ("one", "other"):
        (tmp_path / "datasets" / task).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "datasets" / task / f"{split}.jsonl").write_text(lines)
    shared = {"max_steps": 2, "batch_size": 2, "log_to": "none", "eval_steps": 1, "loss_on": loss_on}
    job = TrainJob(BASE, tmp_path / "datasets", tmp_path / "adapters")
    model = make_tiny_llama(vocab_size=98)
    for task in ("one", "other"):
        done = train_adapter(model, letters(), task, AdapterTrainSettings(**shared, rank=2), job)
        assert math.isfinite(done.loss)
    bank = AdapterBank.from_peft({task: tmp_path / "adapters" / task for task in ("one", "other")})
    settings = GateTrainSettings(**shared, init="ridge", ridge_tokens=64, composite_rows=0.5)
    gates = train_gates(model, letters(), bank, settings, replace(job, out=tmp_path / "gates"))
    assert math.isfinite(gates.loss)
