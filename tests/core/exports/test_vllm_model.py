"""The folder that vLLM serves: base model, changed base tensors, gates and adapters."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.exports.common import ExportOptions
from meteora_core.exports.vllm_model import export_vllm, link_or_copy
from meteora_core.integrations.vllm.checkpoint import Store
from meteora_core.model.base import BaseReference, load_base

HERE = ExportOptions(base="base")
"""The base model in the test's folder, which the checkpoint names by its first path."""
IDS = torch.arange(3, 23).reshape(2, 10)


def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("served/config.json").read_text())
    return found


def test_a_folder_with_base_adapters_and_gates(folder: Path) -> None:
    done = export_vllm("runs/mine", "served", HERE)
    assert (done.kind, done.adapter) == ("vllm", "2 adapters")
    assert described()["quantization_config"] == {"quant_method": "meteora", "checkpoint": "meteora"}
    assert {key: value for key, value in described().items() if key != "quantization_config"} == json.loads(Path("base/config.json").read_text())
    assert Path("served/model.safetensors").samefile("base/model.safetensors")  # a hard link
    assert AutoTokenizer.from_pretrained("served")("even?")["input_ids"] == AutoTokenizer.from_pretrained("base")("even?")["input_ids"]
    store = Store("served/meteora")
    store.check()
    assert store.names == ["gsm8k", "strategyqa"]
    config = json.loads(Path("served/meteora/meteora_config.json").read_text())
    assert config["weights_sha256"] == hashlib.sha256(Path("served/meteora/meteora.safetensors").read_bytes()).hexdigest()
    with torch.inference_mode():
        before = load_checkpoint("runs/mine", dtype="float32", device="cpu")(IDS).logits
        shutil.rmtree("adapters")  # the folder needs nothing else
        torch.testing.assert_close(load_checkpoint("served/meteora", "base", dtype="float32", device="cpu")(IDS).logits, before)
    for path, module in config["modules"].items():
        assert store.tensor(f"{path}.lora_A").shape == (sum(module["ranks"]), module["in_features"])


def test_changed_base_tensors_are_written_into_the_base(folder: Path) -> None:
    model = load_checkpoint("runs/mine", dtype="float32", device="cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.model.norm.weight.requires_grad_(True)
    save_checkpoint(model, "runs/changed", base=None)
    assert json.loads(Path("runs/changed/meteora_config.json").read_text())["base_tensors"] == ["model.norm.weight"]
    export_vllm("runs/changed", "served", HERE)
    now, before = load_file("served/model.safetensors"), load_file("base/model.safetensors")
    torch.testing.assert_close(now["model.norm.weight"], before["model.norm.weight"] * 1.5)
    assert all(torch.equal(now[name], before[name]) for name in before if name != "model.norm.weight")
    config = json.loads(Path("served/meteora/meteora_config.json").read_text())
    assert (config["base_tensors"], config["contains"]) == ([], ["gates", "adapters"])
    plain = AutoModelForCausalLM.from_pretrained("base")
    plain.load_state_dict(now, strict=False)
    with torch.inference_mode(), model.meteora.disabled():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def test_the_configuration_of_a_quantised_base_is_inside(folder: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}))
    export_vllm("runs/mine", "served", HERE)
    base = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert described()["quantization_config"] == {"quant_method": "meteora", "checkpoint": "meteora", "base": base}


def test_a_base_model_of_bitsandbytes_is_refused(folder: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match="quantised by bitsandbytes, which vLLM loads in a way of its own"):
        export_vllm("runs/mine", "served", HERE)
    assert not Path("served").exists()


def test_another_base_model_is_refused(folder: Path) -> None:
    tensors = load_file("base/model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the weights in base are not those that the checkpoint was trained on"):
        export_vllm("runs/mine", "served", HERE)
    assert not Path("served").exists()


def test_existing_folders_and_pickles(folder: Path) -> None:
    Path("base/pytorch_model.bin").write_bytes(b"pickle")
    Path("base/modeling.py").write_text("raise SystemExit")
    export_vllm("runs/mine", "served", HERE)
    assert not [path for path in Path("served").iterdir() if path.suffix in (".bin", ".py")]
    with pytest.raises(UsageError, match="served exists already"):
        export_vllm("runs/mine", "served", HERE)
    export_vllm("runs/mine", "served", ExportOptions(base="base", overwrite=True))
    with pytest.raises(UsageError, match="no base model 'nothing'"):
        export_vllm("runs/mine", "other", ExportOptions(base="nothing"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to")
@pytest.mark.parametrize(("changes", "what"), [({"use_dora": True}, "DoRA"), ({"target_modules": ["q_proj", "lm_head"]}, "the output layer")])
def test_adapters_that_vllm_cannot_serve(folder: Path, make_adapter: Any, changes: dict[str, Any], what: str) -> None:
    bank = AdapterBank.from_peft({"one": make_adapter("one", llama={"vocab_size": 98}, **changes)})
    save_checkpoint(attach(load_base(BaseReference("base"), dtype=torch.float32), bank, top_k=1, init="arrow"), "runs/one")
    with pytest.raises(CheckpointError, match=f"cannot be served by vLLM: they include {what}"):
        export_vllm("runs/one", "served", HERE)


def test_links_to_files_of_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    link_or_copy(tmp_path / "link", tmp_path / "target")
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_text() == "weights"
