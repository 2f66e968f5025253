"""A checkpoint that was saved with relative paths loads from any working directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.model.base import BaseReference, load_base
from support.chat_world import byte_llama, byte_tokenizer, write_adapter


def test_a_checkpoint_of_relative_paths_answers_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    model = byte_llama()
    model.save_pretrained(here / "base")
    byte_tokenizer().save_pretrained(here / "base")
    for seed, name in enumerate(("one", "two")):
        write_adapter(here / "adapters" / name, model, Path("base"), seed)
    monkeypatch.chdir(here)
    attached = attach(load_base(BaseReference("base")), AdapterBank.from_peft({name: f"adapters/{name}" for name in ("one", "two")}), init="arrow")
    save_checkpoint(attached, "runs/mine")
    ids = torch.tensor([[1, 60, 70, 80]])
    with torch.no_grad():
        wanted = attached(ids).logits
        monkeypatch.chdir(elsewhere)
        assert torch.equal(load_checkpoint(here / "runs" / "mine")(ids).logits, wanted)
        assert torch.equal(load_checkpoint(os.path.relpath(here / "runs" / "mine"))(ids).logits, wanted)
        shutil.move(here, tmp_path / "moved")
        assert torch.equal(load_checkpoint(tmp_path / "moved" / "runs" / "mine", tmp_path / "moved" / "base")(ids).logits, wanted)
