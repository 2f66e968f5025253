"""Which device and number type run, and loading a base model by name."""

from __future__ import annotations

import pytest
import torch

from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.base import BaseReference, fast_cpu_dtype, load_base, pick_device, pick_dtype
from tiny_models import make_tiny_llama


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


def test_an_encoder_decoder_is_refused_for_what_it_is(tmp_path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="T5Config") as caught:
        load_base(BaseReference(str(tmp_path)))
    assert "causal language model" in str(caught.value.hint)
    assert "network" not in str(caught.value.hint)
