"""Shared pieces: a tiny Llama, tiny adapters, and the real small base model."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # pytest-xdist ignores Ctrl-C in its workers, and so would all their children: the tests that press it need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Processes side by side share the cores; to be known before torch is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import torch

from support.tiny_models import make_tiny_llama

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; to be known before Triton is first imported


LONGEST = (
    "test_end_to_end.py",
    "test_train_command.py",
    "test_real_bigbench.py",
    "test_evaluate.py",
    "test_real_model_batches.py",
    "test_sharding.py",
    "test_chat_command.py",
    "test_jobs.py",
    "test_stages.py",
    "test_lm_eval_model.py",
    "test_eval_command.py",
    "test_fused_evaluation.py",
    "test_fuse.py",
    "test_fused_chat.py",
)
"""The files that take longest, in the order in which they begin: the many short ones behind them end together on all workers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the machine must not reach a test."""
    for name in [name for name in os.environ if name.startswith("METEORA_") and name != "METEORA_CACHE"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _kernels_still_run() -> Iterator[None]:
    """A test after which ``auto`` leaves the GPU kernels alone would change what the tests behind it test."""
    from meteora_kernels.mixture import _broken

    yield
    assert not _broken, "this test made auto give up the GPU kernels: the reason beside the device is the compiler's or the driver's"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
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
