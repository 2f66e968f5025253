"""DoRA: adapters of this kind are trained alone, and gates are trained over them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from meteora_core import AdapterBank, attach, load_checkpoint
from meteora_core.errors import UsageError
from meteora_core.training.joint_adapters import train_together
from support.tiny_training import IDS, Killed, adapter, gates, kill_at, letters, model, together_options, write_data


def logits(of) -> torch.Tensor:
    with torch.inference_mode():
        return of(IDS).logits


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows"))


def test_dora_adapters_train_and_are_what_peft_loads(data, tmp_path) -> None:
    adapter(data, tmp_path / "adapters", dora=True)
    adapter(data, tmp_path / "adapters", "count")
    assert json.loads((tmp_path / "adapters" / "shout" / "adapter_config.json").read_text())["use_dora"] is True
    theirs = logits(PeftModel.from_pretrained(model(), tmp_path / "adapters" / "shout").eval())
    bank = AdapterBank.from_peft({name: tmp_path / "adapters" / name for name in ("shout", "count")})
    attached = attach(model(), bank)
    with attached.meteora.force("shout"):
        torch.testing.assert_close(logits(attached), theirs, rtol=0, atol=1e-5)
    base, done = gates(data, tmp_path / "adapters", tmp_path / "gates")
    assert done.loss == done.loss
    assert torch.equal(logits(load_checkpoint(tmp_path / "gates", model())), logits(base.eval()))


def test_a_killed_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch) -> None:
    adapter(data, tmp_path / "whole", dora=True)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            adapter(data, tmp_path / "killed", dora=True)
    adapter(data, tmp_path / "killed", dora=True)
    name = "shout/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_adapters_trained_without_it_stay_current(data, tmp_path) -> None:
    """The setting is left out of a run's inputs while it is off, as in runs of earlier versions."""
    assert not adapter(data, tmp_path).skipped
    assert "dora" not in json.loads((tmp_path / "shout" / "meteora_training.json").read_text())["inputs"]["settings"]
    assert adapter(data, tmp_path).skipped
    assert not adapter(data, tmp_path, dora=True).skipped


def test_together_refuses_it(data, tmp_path) -> None:
    with pytest.raises(UsageError, match="--together cannot train DoRA"):
        train_together(model(), letters(), ["shout", "count"], **together_options(data, tmp_path, dora=True))
