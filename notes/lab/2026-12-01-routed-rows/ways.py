"""Closed-form gates from rows that ran in different ways: with their own adapter, on the base alone, with either in each block, and as the gates route them.

python ways.py BASE ADAPTERS DATA OUT.json [--device cuda] [--dtype bfloat16] [--tokens 8000] [--held 64] [--deadline SECONDS] [--most 25]

BASE is a model folder or a name of the catalog, ADAPTERS a folder of PEFT folders, DATA a folder of built datasets. Each set of gates routes held-out rows, and
OUT.json is written after each. `own` and `bare` stand for the first three quarters of the rows with their adapter and the rest on the base model alone.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import with_adapter
from meteora_core.checkpoints.gate_statistics import Recipe
from meteora_core.data.tasks import TASKS
from meteora_core.errors import MeteoraError
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.routing import IGNORE
from meteora_core.training.encoding import collate, encode_rows, row_lengths
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.input_sums import InputSums, filled_labels, token_weights
from meteora_core.training.ridge import ridge_rows
from meteora_core.training.statistics import _counted, _planned
from meteora_core.training.task_rows import HeldOut

parser = argparse.ArgumentParser()
parser.add_argument("base")
for name in ("adapters", "data", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--tokens", type=int, default=8000)
parser.add_argument("--held", type=int, default=64)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--most", type=int, default=25)
parser.add_argument("--deadline", type=float, default=1e9, help="seconds after the start of the call, as time since the epoch in $BEGAN")
given = parser.parse_args()
BEGAN = float(os.environ.get("BEGAN", time.time()))

base = BaseReference(given.base)
device = torch.device(given.device)
tokenizer, model = load_tokenizer(base), load_base(base, dtype=getattr(torch, given.dtype), device=device).eval()
names = [path.name for path in sorted(given.adapters.iterdir()) if (path / "adapter_config.json").is_file() and path.name in TASKS][: given.most]
every = [*names, NO_ADAPTER]
options = CollectOptions(data=given.data, device=given.device, tokens=given.tokens, max_length=512)
how = collecting(options, base, model, tokenizer, Recipe(answer_share=0.8, bare_share=0.25))
collector = Collector(tokenizer, how, Path(), lambda name, folder: find_rows(name, given.data, folder, tokenizer))
bank = collector.with_frame(with_adapter(AdapterBank.from_peft({name: given.adapters / name for name in names}), base_route()))
attach(model, bank, top_k=2, init="zeros")
state, layers = model.meteora, dict(meteora_layers(model))
decoder = model.base_model
results: dict[str, dict] = {}


def log(*parts: object) -> None:
    print(f"{time.time() - BEGAN:6.1f} [ways]", *parts, flush=True)


class Sums:
    """Second moments and means of rows, by layer; every adapter has a weight of 1, and each share of the rows the same sums."""

    def __init__(self, rows: list, around: Callable[[torch.Tensor], AbstractContextManager]) -> None:
        counts = sum(label != IGNORE for _, row in rows for label in row.gate_labels)
        table = token_weights([row for _, row in rows], len(every), how.recipe.answer_share) / (counts / len(every))
        sums = InputSums(len(every), table)
        ordered = sorted((row for _, row in rows), key=len)
        with sums.observing(layers.values(), MeteoraError("out of memory")), torch.no_grad():
            for start in range(0, len(ordered), given.batch):
                batch = collate(ordered[start : start + given.batch], how.pad_token).to(device)
                labels = batch.gate_labels.reshape(-1)
                keep = labels != IGNORE
                sums.begin(keep, labels[keep], batch.response.reshape(-1)[keep])
                with around(filled_labels(batch.gate_labels)):
                    decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        self.sums, self.tokens = sums, counts


def use(parts: list[tuple[float, Sums]], with_base: bool = True) -> None:
    """Solve the gates from sums with these weights, and set them; without the base route, its row is 0 and it is muted."""
    solved: dict[int, torch.Tensor] = {}
    for path, layer in layers.items():
        key = parts[0][1].sums.of[id(layer)]
        if key not in solved:
            total = sum(weight * each.sums.square(key).double() for weight, each in parts)
            means = sum(weight * each.sums.means[key].double() for weight, each in parts)
            solved[key] = ridge_rows(total, means).float() * 8
        with torch.no_grad():
            layer.gate.copy_(solved[key])
    state.mute([] if with_base else [NO_ADAPTER])


def measure(name: str, temperature: float = 1.0) -> None:
    groups = []
    for index, task in enumerate(every):
        rows = [] if task == NO_ADAPTER else collector.rows(task).held_out[: given.held]
        end = None if task == NO_ADAPTER else collector.rows(task).frame.end_id(tokenizer)
        groups.append(list(encode_rows(rows, tokenizer, index, 512, end).rows) if rows else [])
    state.temperature = temperature
    measured = measure_gates(model, HeldOut(groups, every, how.pad_token, given.batch, response_only=True))
    state.temperature = 1.0
    tasks = {task: measured[f"gate_accuracy/{task}"] for task in names}
    losses = [measured[f"lm_loss/{task}"] for task in names]
    results[name] = {"answers": measured["gate_accuracy"], "mean over tasks": sum(tasks.values()) / len(tasks), "all tokens": measured["gate_accuracy_all"]}
    results[name] |= {"loss": measured["lm_loss"], "mean loss": sum(losses) / len(losses), "details": measured}
    given.out.with_suffix(".part").write_text(json.dumps(results))
    os.replace(given.out.with_suffix(".part"), given.out)
    log(name, {key: round(value, 4) for key, value in results[name].items() if key != "details"})


def blocks(rows: list, share: float) -> Sums:
    """Sums of rows that run with their own adapter in this share of the blocks, drawn for each row and block, and on the base alone in the others."""
    generator, wanted = torch.Generator().manual_seed(0), []

    def choose(module: torch.nn.Module, arguments: object) -> None:
        own = torch.rand(len(wanted[-1]), 1, generator=generator).to(device) < share
        state.mode = replace(state.mode, forced=torch.where(own, wanted[-1], len(names)))

    def around(labels: torch.Tensor) -> AbstractContextManager:
        wanted.append(labels)
        return state.force(labels)

    hooks = [block.register_forward_pre_hook(choose) for block in decoder.layers]
    try:
        return Sums(rows, around)
    finally:
        for hook in hooks:
            hook.remove()


def variants() -> None:
    first, second = [], []
    for index, name in enumerate(every):
        rows = collector.train_rows(name, index)
        counted = [(index, _counted(rows[row], row, how)) for picks in _planned(row_lengths(rows), how)[0] for row in picks]
        first += counted[: len(counted) * 3 // 4]
        second += counted[len(counted) * 3 // 4 :]
    log(len(first), len(second), "rows")
    own, own_rest, bare = Sums(first, state.force), Sums(second, state.force), Sums(second, lambda labels: state.disabled())
    usual = [(0.75, own), (0.25, bare)]
    use([(0.75, own), (0.25, own_rest)])
    measure("own adapters alone")
    use(usual)
    measure("a quarter on the base alone")
    free: Callable[[torch.Tensor], AbstractContextManager] = lambda labels: nullcontext()  # noqa: E731
    rounds: list[tuple[float, Sums]] = []
    for number in (1, 2):
        if time.time() - BEGAN > given.deadline:
            return
        state.mute([])
        rounds = [*(rounds or usual), (1.0, Sums(first + second, free))]
        use(rounds)
        measure(f"routed rows, {number} rounds")
        for temperature in (0.5, 2.0) if number == 1 else ():
            measure(f"routed rows, 1 round, T {temperature:g}", temperature)
    if time.time() - BEGAN > given.deadline:
        return
    use([*usual, (1.0, blocks(first + second, 0.5))])
    measure("rows with their adapter in half of the blocks")
    use(usual, with_base=False)
    measure("a quarter on the base alone, no base route")


log("loaded", len(names), "adapters")
variants()
