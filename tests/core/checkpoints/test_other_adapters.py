"""Checkpoints of DoRA, biases, whole output layers and experts: the same model in every form, and a format that earlier versions refuse."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native_config import CONFIG_FILE, read_config
from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.exports.merged import merge_adapter
from meteora_core.exports.peft_adapter import export_adapter
from meteora_core.living.checkpoints import drop_adapter
from meteora_core.model.attach import detach, meteora_layers, set_trainable
from support.architectures import BY_KIND, make_model, save_lora
from support.tiny_models import declare_trained
from support.tiny_training import letters

IDS = torch.arange(3, 27).reshape(2, 12)
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, ["scale"]),
    "bias": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}, ["shift"]),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}, ["shift"]),
    "dora and bias": ("gpt2", {"use_dora": True, "bias": "lora_only", "target_modules": ["c_attn"]}, ["scale", "shift"]),
    "whole lm_head": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, []),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": list(BY_KIND["qwen3_moe"].parameters)}, ["experts"]),
}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def forced(model: Any, name: str) -> torch.Tensor:
    with model.meteora.force(name):
        return logits(model)


@pytest.fixture(params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str], torch.Tensor]:
    """A folder with ``base``, a plain adapter ``plain`` and an adapter ``other`` of the kind; its features, and its logits in PEFT."""
    kind, settings, features = KINDS[request.param]
    monkeypatch.chdir(tmp_path)
    make_model(kind).save_pretrained("base")
    letters().save_pretrained("base")
    theirs = logits(save_lora(make_model(kind), Path("other"), 1, **settings))
    plain = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    save_lora(make_model(kind), Path("plain"), 2, target_modules=plain)
    for name in ("plain", "other"):
        file = Path(name) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "base"}))
    return kind, features, theirs


def attached(kind: str) -> Any:
    bank = AdapterBank.from_peft({"plain": "plain", "other": "other"})
    model = declare_trained(attach(make_model(kind), bank))
    model.name_or_path = "base"
    with torch.no_grad():
        for _, layer in meteora_layers(model):
            layer.gate.mul_(20)
    return model


def test_every_form_is_the_same_model(case) -> None:
    kind, features, theirs = case
    model = attached(kind)
    routed = logits(model)
    torch.testing.assert_close(forced(model, "other"), theirs, rtol=0, atol=1e-5)
    assert (routed - theirs).abs().max() > 1e-3
    save_checkpoint(model, "gates")
    save_checkpoint(model, "whole", adapters=True)
    for folder in ("gates", "whole"):
        config = read_config(folder)
        assert (config["format"], config.get("features", [])) == (2 if features else 1, features)
        loaded = load_checkpoint(folder, make_model(kind))
        assert torch.equal(logits(loaded), routed), folder
    with pytest.raises(CheckpointError, match="uses telepathy, which this version does not know"):
        file = Path("whole") / CONFIG_FILE
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "features": ["telepathy"]}))
        read_config("whole")


def test_what_is_packed_exported_and_dropped(case) -> None:
    kind, features, theirs = case
    model = attached(kind)
    routed = logits(model)
    for folder, adapters in (("gates", False), ("whole", True)):
        save_checkpoint(model, folder, adapters=adapters)
        pack_checkpoint(folder, f"{folder}-packed", PackOptions(dtype=torch.float32))
        torch.testing.assert_close(logits(load_checkpoint(f"{folder}-packed", make_model(kind))), routed, rtol=0, atol=1e-5)
        export_adapter(folder, f"{folder}-peft", "other")
        again = attach(make_model(kind), AdapterBank.from_peft({"other": f"{folder}-peft"}), top_k=1)
        torch.testing.assert_close(forced(again, "other"), theirs, rtol=0, atol=2e-5)
    drop_adapter("whole", "plain")
    alone = load_checkpoint("whole", make_model(kind), allow_untrained=True)
    torch.testing.assert_close(logits(alone), theirs, rtol=0, atol=1e-5)
    assert read_config("whole").get("features", []) == features
    drop_from = attached(kind)
    save_checkpoint(drop_from, "whole", adapters=True)
    drop_adapter("whole", "other")
    assert read_config("whole")["format"] == 1


def test_exports_are_what_peft_loads(case) -> None:
    from peft import PeftModel

    kind, _, theirs = case
    save_checkpoint(attached(kind), "whole", adapters=True)
    export_adapter("whole", "out", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on layers without a bias, and on Conv1D
        exported = PeftModel.from_pretrained(make_model(kind), "out")
    torch.testing.assert_close(logits(exported.eval()), theirs, rtol=0, atol=2e-5)


def test_merged_and_detached(case) -> None:
    kind, features, theirs = case
    model = attached(kind)
    if features == ["shift"] and kind == "llama":
        with pytest.raises(UsageError, match="the base model has no bias there"):
            merge_adapter(model, "other")
    else:
        merge_adapter(model, "other")
        torch.testing.assert_close(logits(model), theirs, rtol=0, atol=2e-5)
    plain = make_model(kind)
    if features != ["shift"] or kind != "llama":
        model = attached(kind)
    assert torch.equal(logits(detach(model)), logits(plain))


def test_dora_does_not_train_together_with_gates(tmp_path: Path) -> None:
    save_lora(make_model("llama"), tmp_path / "a", use_dora=True, target_modules=["q_proj"])
    model = attach(make_model("llama"), AdapterBank.from_peft({"a": tmp_path / "a"}), top_k=1)
    with pytest.raises(UsageError, match="DoRA adapters cannot be trained together with gates"):
        set_trainable(model, "gates+adapters")
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(layer.gate.grad is not None for _, layer in meteora_layers(model))


def test_dtypes_keep_the_tables_exact(tmp_path: Path) -> None:
    save_lora(make_model("llama"), tmp_path / "a", use_dora=True, target_modules=["q_proj"])
    model = attach(make_model("llama"), AdapterBank.from_peft({"a": tmp_path / "a"}), top_k=1)
    before = {path: layer.scale.clone() for path, layer in meteora_layers(model)}
    model.to(torch.bfloat16)
    assert all(torch.equal(layer.scale, before[path]) for path, layer in meteora_layers(model))
    assert logits(model).isfinite().all()
