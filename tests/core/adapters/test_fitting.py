"""Adapters whose base model has other names for its modules by now."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.errors import AdapterError
from meteora_core.evaluation.adapters import with_adapter
from support.adapter_files import write_adapter
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.arange(10, 30).reshape(2, 10)
OLD, NEW = "language_model.model.", "model.language_model."


def make_llava():
    """A tiny vision-language model whose language model was ``language_model.model`` before transformers 4.52."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)).eval()


@pytest.fixture
def folders(tmp_path):
    """The same adapter under the names of today and of then."""
    made = {}
    for name, prefix in (("now", NEW), ("then", OLD)):
        target = rf".*language_model.*\.({'|'.join(('q_proj', 'down_proj'))})"
        folder = write_adapter(tmp_path / name, target_modules=target)
        file = folder / "adapter_model.safetensors"
        save_file({key.replace("base_model.model.model.", f"base_model.model.{prefix}"): tensor for key, tensor in load_file(file).items()}, file)
        made[name] = folder
    return made


def test_names_of_earlier_versions_are_read(folders, tmp_path) -> None:
    logits = []
    for name, folder in folders.items():
        model = attach(make_llava(), AdapterBank.from_peft({name: folder}), top_k=1)
        with torch.inference_mode():
            logits.append(model(input_ids=IDS).logits)
            with with_adapter(make_llava(), folder) as alone:
                torch.testing.assert_close(alone(input_ids=IDS).logits, logits[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(*logits)
    assert model.meteora.provenance.renamed
    save_checkpoint(declare_trained(model), tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(tmp_path / "saved", make_llava())(input_ids=IDS).logits, logits[0])


def test_a_model_of_another_kind_is_not_called_another_base(folders) -> None:
    with pytest.raises(AdapterError, match=r"language_model\.layers\.0") as caught:
        attach(make_tiny_llama(), AdapterBank.from_peft({"x": folders["now"]}), top_k=1)
    assert "it calls such a module model.layers.0" in str(caught.value.hint)
