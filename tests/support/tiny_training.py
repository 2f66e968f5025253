"""A model, a tokenizer, rows and both stages of training, all so small that a training takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from meteora_core import AdapterBank
from meteora_core.model.base import BaseReference
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings
from meteora_core.training import loop
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.single_adapter import train_adapter
from support.tiny_models import make_tiny_llama

BASE = BaseReference("tiny")
IDS = torch.randint(3, 98, (2, 12), generator=torch.Generator().manual_seed(5))


def letters(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character; it may add BOS and EOS as Llama's do."""
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(code): code - 30 for code in range(32, 127)}, "\n": 97}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos or eos:
        template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def model():
    return make_tiny_llama(vocab_size=98, initializer_range=0.2)


def write_data(folder: Path) -> Path:
    """Two tasks that a tiny model can learn: one answers in letters, one in digits."""
    for task, make in {"shout": lambda i: (f"say {chr(97 + i % 26)}\n", chr(65 + i % 26) * 3), "count": lambda i: (f"{i % 9} +1?\n", str(i % 9 + 1))}.items():
        task_folder = folder / task
        task_folder.mkdir(parents=True)
        rows = [dict(zip(("prompt", "response"), make(i), strict=True)) for i in range(40)]
        for split, part in (("train", rows[:30]), ("test", rows[30:])):
            (task_folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def held_out_rows(data: Path) -> None:
    """Enough train rows that some are held out."""
    for task in ("shout", "count"):
        path = data / task / "train.jsonl"
        path.write_text(path.read_text() * 3)


def adapter(data: Path, out: Path, task: str = "shout", **changes):
    settings = AdapterTrainSettings(
        **{"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "rank": 2, "dropout": 0.1, "save_steps": 2, "log_steps": 1, **changes}
    )
    return train_adapter(model(), letters(), task, settings, TrainJob(BASE, data, out, resume=True))


def gates(data: Path, adapters: Path, folder: Path, *, resume: bool = False, base=None, **changes):
    settings = GateTrainSettings(**{"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "log_steps": 1, "log_to": "none", **changes})
    bank = AdapterBank.from_peft({"shout": adapters / "shout", "count": adapters / "count"})
    base = base or model()
    return base, train_gates(base, letters(), bank, settings, TrainJob(BASE, data, folder, resume=resume))


def together_options(data: Path, out: Path, **changes):
    """Arguments of :func:`train_together`, and of :func:`train_adapter` for the same result."""
    settings = {"max_steps": 6, "batch_size": 3, "learning_rate": 1e-2, "rank": 2, "dropout": 0.0, "log_steps": 1, "save_steps": 2, "log_to": "none"}
    return {"settings": AdapterTrainSettings(**{**settings, **changes}), "job": TrainJob(BASE, data, out, resume=True)}


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it and carry on."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The optimizer step of this number raises :class:`Killed`."""
    real = loop._Stepper.step
    count = iter(range(1, 1000))

    def stopping(*arguments, **named):
        if next(count) == step:
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(loop._Stepper, "step", stopping)
