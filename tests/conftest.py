"""The order of the test files, a tiny Llama and tiny adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.order import FIRST
from support.tiny_models import make_tiny_llama

collect_ignore_glob = ["conftest.py", "*/conftest.py", "*/*/conftest.py", "robustness/[!t]*.py", "support/*.py"]
"""Programs and helpers: their docstrings hold no examples."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


@pytest.fixture
def tiny_llama():
    """A fresh tiny Llama."""
    return make_tiny_llama()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random PEFT LoRA folder for the tiny Llama, made by PEFT itself."""

    def make(name: str, seed: int = 0, *, llama: dict[str, int] | None = None, **config: object) -> Path:
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
