"""Shared pieces: a tiny Llama, tiny adapters, and the real small base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; to be known before Triton is first imported


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the machine must not reach a test."""
    for name in [name for name in os.environ if name.startswith("METEORA_") and name != "METEORA_CACHE"]:
        monkeypatch.delenv(name)


def make_tiny_llama(seed: int = 0, **changes: int):  # noqa: ANN201
    """A random Llama: 2 layers, hidden 32, grouped-query attention, float32, evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(**{**sizes, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_llama():  # noqa: ANN201
    """A fresh tiny Llama."""
    return make_tiny_llama()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random PEFT LoRA folder for the tiny Llama, made by PEFT itself."""

    def make(name: str, seed: int = 0, *, llama: dict[str, int] | None = None, **config: object) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        options: dict[str, object] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
        model = get_peft_model(make_tiny_llama(**(llama or {})), LoraConfig(**{**options, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        folder = tmp_path / "adapters" / name
        model.save_pretrained(folder)
        return folder

    return make
