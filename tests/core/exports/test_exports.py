"""Exports: what other programs load computes what the checkpoint's adapter computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meteora_core import load_checkpoint
from meteora_core.checkpoints.native import read_config
from meteora_core.errors import UsageError
from meteora_core.exports.common import ExportOptions
from meteora_core.exports.merged import export_merged
from meteora_core.exports.peft_adapter import export_adapter

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def forced(name: str) -> torch.Tensor:
    model = load_checkpoint("runs/mine", dtype="float32", device="cpu")
    with model.meteora.force(name):
        return logits(model)


def through_peft(adapter: Path | str) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter))


@pytest.mark.parametrize("name", ["gsm8k", "strategyqa"])
def test_an_exported_adapter_is_what_peft_loads(folder: Path, name: str) -> None:
    done = export_adapter("runs/mine", "out", name)
    assert (done.kind, done.adapter, done.files) == ("peft", name, ("adapter_config.json", "adapter_model.safetensors"))
    torch.testing.assert_close(through_peft("out"), through_peft(f"adapters/{name}"), rtol=0, atol=0)
    torch.testing.assert_close(through_peft("out"), forced(name), rtol=0, atol=1e-5)
    assert (forced("gsm8k") - forced("strategyqa")).abs().max() > 1e-2


def test_an_exported_adapter_names_its_base(folder: Path) -> None:
    export_adapter("runs/mine", "out", "gsm8k")
    written = json.loads(Path("out/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == (read_config("runs/mine")["base"]["name"], 4, 8)
    assert len(written["target_modules"]) == 14


def test_a_merged_model_is_what_transformers_loads(folder: Path) -> None:
    done = export_merged("runs/mine", "out", "strategyqa")
    assert done.kind == "merged"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("out")), forced("strategyqa"), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained("out")("ab")["input_ids"] == AutoTokenizer.from_pretrained("base")("ab")["input_ids"]
    export_merged("runs/mine", "out", "strategyqa", ExportOptions(overwrite=True), "bfloat16")
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16


def test_what_cannot_be_exported(folder: Path) -> None:
    with pytest.raises(UsageError, match="no adapter named 'gsm8'"):
        export_adapter("runs/mine", "out", "gsm8")
    with pytest.raises(UsageError, match="no adapter named 'gsm8'"):
        export_merged("runs/mine", "out", "gsm8")
    with pytest.raises(UsageError, match="exists already"):
        export_adapter("runs/mine", "base", "gsm8k")
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        export_adapter("runs/mine", "runs/mine", "gsm8k", ExportOptions(overwrite=True))
    with pytest.raises(UsageError, match="is not a native checkpoint"):
        export_adapter("base", "out", "gsm8k")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        export_merged("runs/mine", "out", "gsm8k", dtype="int8")
    assert not Path("out").exists()
