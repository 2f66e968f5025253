"""Three tiny adapters with rows, and their statistics."""

from __future__ import annotations

from pathlib import Path

from meteora_core import AdapterBank
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe
from meteora_core.model.base import BaseReference
from meteora_core.training.encoding import TrainRow
from meteora_core.training.statistics import Collecting, collect_statistics
from support.adapter_files import lora_tensors, write_adapter
from support.tiny_models import make_tiny_llama

NAMES = ("count", "shout", "spell")
HOW = Collecting(BaseReference("tiny"), pad_token=2, recipe=Recipe(), tokens=400, batch_size=4, prompt_every=1, half_precision=False)


def tiny_rows(adapter: int, count: int = 12) -> list[TrainRow]:
    """Rows of one adapter: its own token ids, with a prompt of six tokens and an answer of three or more."""
    made = []
    for number in range(count):
        tokens = [3 + 19 * adapter + (number * 7 + place * 3) % 18 for place in range(9 + number % 3)]
        made.append(TrainRow(tuple(tokens), (adapter,) * len(tokens), 6))
    return made


def write_adapters(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, Path]:
    """One PEFT folder an adapter, by name."""
    return {name: write_adapter(folder / name, lora_tensors(seed + 1)) for seed, name in enumerate(names)}


def collect_all(folder: Path, folders: dict[str, Path], how: Collecting = HOW) -> dict[str, GateStatistics]:
    """The statistics of every adapter, each with a base model of its own, as several people would collect them."""
    found = {}
    for place, (name, adapter) in enumerate(folders.items()):
        bank = AdapterBank.from_peft({name: adapter})
        found[name] = collect_statistics(make_tiny_llama(), bank, tiny_rows(place), folder / f"{name}.safetensors", how)
    return found
