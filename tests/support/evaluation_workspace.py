"""A tiny base model with a tokenizer, three adapters, a checkpoint and datasets on disk, for tests of whole evaluations."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meteora_core.json_files import write_jsonl
from support.tiny_models import declare_trained, make_tiny_llama

SIZES = {"vocab_size": 112, "max_position_embeddings": 1024}
TASKS = ("logical_deduction", "question_selection", "strategyqa")


@dataclass(frozen=True)
class Workspace:
    """Where everything lies."""

    folder: Path
    base: Path
    data: Path
    adapters: Path
    checkpoint: Path


def make_tokenizer():
    """One token a printable ASCII character; <s> is 1 and </s> is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: place for place, letter in enumerate(string.printable, start=3)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def rows(task: str, count: int) -> list[dict[str, str]]:
    """Rows whose prompts have very different lengths."""
    return [{"prompt": f"[INST] {task[: 3 + 5 * (i % 5)]} {i * 37} [/INST]\n", "response": ("yes" if i % 2 else "no") + f" {i}"} for i in range(count)]


def make_workspace(folder: Path, make_adapter: Callable[..., Path], count: int = 7) -> Workspace:
    """Write everything below ``folder``; the adapters go where ``make_adapter`` puts them."""
    from meteora_core import AdapterBank, attach, save_checkpoint
    from meteora_core.model.base import BaseReference

    base, data, checkpoint = folder / "base", folder / "datasets", folder / "runs" / "meteora"
    model = make_tiny_llama(initializer_range=0.3, **SIZES)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    folders = {task: make_adapter(task, seed, llama=SIZES) for seed, task in enumerate(TASKS)}
    save_checkpoint(declare_trained(attach(model, AdapterBank.from_peft(folders), seed=3)), checkpoint, base=BaseReference(str(base)))
    for task in TASKS:
        write_jsonl(data / task / "test.jsonl", rows(task, count))
    composite = [
        {"prompt": row["prompt"], "response": "@@@@\n".join(rows(task, count)[i]["response"] for task in TASKS)}
        for i, row in enumerate(rows("composite_3", count))
    ]
    write_jsonl(data / "composite_3" / "test.jsonl", composite)
    return Workspace(folder, base, data, folders[TASKS[0]].parent, checkpoint)


def make_packed(folder: Path, make_adapter: Callable[..., Path]) -> Workspace:
    """A workspace in ``folder/world``, its checkpoint with the adapters inside in ``folder/packed``, raw rows of its tasks in ``folder/raw``."""
    from meteora_core.checkpoints.pack import pack_checkpoint

    place = make_workspace(folder / "world", make_adapter)
    for task in TASKS:
        for split, count in (("train", 12), ("test", 4)):
            raw = [{"prompt": f"[INST] {task[:5]} {split} {i} [/INST]\n", "response": f"yes {i}"} for i in range(count)]
            write_jsonl(folder / "raw" / task / f"{split}.jsonl", raw)
    pack_checkpoint(place.checkpoint, folder / "packed", adapters_dir=place.adapters)
    return place
