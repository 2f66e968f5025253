"""The choice of device and dtype, and loading a base model by name."""

from __future__ import annotations

import pytest
import torch

from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.base import BaseReference, fast_cpu_dtype, load_base, pick_device, pick_dtype
from support.tiny_models import make_tiny_llama


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto") == pick_device(None)
    for name in ("warp", "cuda:99"):
        with pytest.raises(UsageError) as caught:
            pick_device(name)
        assert "auto" in str(caught.value.hint)


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == pick_dtype(None, cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == pick_dtype(torch.bfloat16, cpu) == torch.bfloat16
    with pytest.raises(UsageError, match="int3"):
        pick_dtype("int3", cpu)
    dtype, why = fast_cpu_dtype()
    assert dtype in (torch.float32, torch.bfloat16)
    assert "x as fast" in why


def test_a_folder_is_loaded_and_pickles_are_not(tmp_path) -> None:
    model = make_tiny_llama()
    model.save_pretrained(tmp_path / "safe")
    loaded = load_base(BaseReference(str(tmp_path / "safe")), dtype=torch.float64)
    assert loaded.dtype == torch.float64
    assert not loaded.training
    (tmp_path / "safe" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "safe" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load the model"):
        load_base(BaseReference(str(tmp_path / "safe")))


def test_an_encoder_decoder_is_refused_by_name(tmp_path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="T5Config") as caught:
        load_base(BaseReference(str(tmp_path)))
    assert "causal language model" in str(caught.value.hint)
    assert "network" not in str(caught.value.hint)


def test_a_base_that_lacks_weights_or_is_broken_is_refused_in_one_line(tmp_path) -> None:
    """transformers would initialise missing weights at random, with a warning."""
    import json

    from safetensors.torch import load_file, save_file

    make_tiny_llama().save_pretrained(tmp_path)
    reference, file = BaseReference(str(tmp_path)), tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({name: tensor for name, tensor in whole.items() if "layers.0.self_attn.q_proj" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack weights of the model: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_base(reference)
    save_file({**whole, "model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot load the model"):
        load_base(reference)
    save_file(whole, file, metadata={"format": "pt"})
    load_base(reference)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["2"]}))
    with pytest.raises(CheckpointError, match="end token"):
        load_base(reference)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_base_with_numbers_that_are_not_finite_is_refused(tmp_path, number) -> None:
    """A key of NaN gives finite logits on a CPU: PyTorch's attention answers zeros where every score is NaN."""
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = number
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight of the base model .* holds") as caught:
        load_base(BaseReference(str(tmp_path)))
    assert "again" in str(caught.value.hint)


def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path) -> None:
    import json

    from meteora_core.model.base import load_tokenizer
    from support.evaluation_workspace import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(BaseReference(str(tmp_path)))
    good = (tmp_path / "tokenizer_config.json").read_text()
    for name, content in (("tokenizer.json", "3"), ("tokenizer_config.json", json.dumps({**json.loads(good), "model_max_length": {}}))):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
            load_tokenizer(BaseReference(str(tmp_path)))
        (tmp_path / name).write_text(before)
