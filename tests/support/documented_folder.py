"""The folder in which the examples of docstrings run: a base model, adapters, a checkpoint and a dataset, under the names that the examples use."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach, save_checkpoint
from meteora_core.model.base import BaseReference, load_base
from support.tiny_models import make_tiny_llama
from support.tiny_training import letters

RANKS = {"gsm8k": 4, "strategyqa": 8}
"""Adapter -> rank."""


def write_documented_folder(folder: Path) -> Path:
    """Write ``base/``, ``adapters/gsm8k/``, ``adapters/strategyqa/``, ``runs/mine/`` and ``datasets/strategyqa/``; return the folder."""
    with contextlib.chdir(folder):
        make_tiny_llama(vocab_size=98).save_pretrained("base")
        letters().save_pretrained("base")
        for seed, (name, rank) in enumerate(RANKS.items()):
            _write_adapter(name, rank, seed)
        bank = AdapterBank.from_peft({name: f"adapters/{name}" for name in RANKS})
        save_checkpoint(attach(load_base(BaseReference("base")), bank, init="arrow"), "runs/mine")
        rows = [{"prompt": f"[INST] Is {number} even? [/INST]\n", "response": "No" if number % 2 else "Yes"} for number in range(24)]
        Path("datasets/strategyqa").mkdir(parents=True)
        for split in ("train", "test"):
            Path(f"datasets/strategyqa/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _write_adapter(name: str, rank: int, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_tiny_llama(vocab_size=98), config)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(f"adapters/{name}")
