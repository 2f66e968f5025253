"""Closed-form gates from rows that ran in different ways: with their own adapter, on the base alone, with either in each block, and as the gates route them.

python exposure.py ADAPTERS DATA WORK collect KIND GATES [TOKENS]     KIND: own, bare, blocks, routed; GATES: a file that measure wrote, or -
python exposure.py ADAPTERS DATA WORK measure NAME KIND=SHARE,… [T=TEMPERATURE] [base=0]

`collect` writes the sums of each layer input to WORK/KIND.a.pt, from the first three quarters of the rows, and WORK/KIND.b.pt, from the rest (KIND of routed
rows: routed-GATES). `measure` solves, writes WORK/NAME.gates.pt, and routes held-out rows by these gates; `base=0` leaves out the base route.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import with_adapter
from meteora_core.checkpoints.gate_statistics import Recipe
from meteora_core.errors import MeteoraError
from meteora_core.living import collector as collectors
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.routing import IGNORE
from meteora_core.training.encoding import collate, row_lengths
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.input_sums import InputSums, filled_labels, token_weights
from meteora_core.training.ridge import ridge_rows
from meteora_core.training.statistics import _counted, _planned

torch.set_num_threads(1)
collectors.HELD_OUT_TOKENS = 600
adapters, data, work = map(Path, sys.argv[1:4])
stage, rest = sys.argv[4], sys.argv[5:]
OWN = 0.5
"""Share of the blocks in which a row of `blocks` runs with its own adapter."""

base = BaseReference("smollm2-135m")
tokenizer, model = load_tokenizer(base), load_base(base, dtype=torch.float32, device=torch.device("cpu"))
names = sorted(path.name for path in adapters.iterdir())
bank = with_adapter(AdapterBank.from_peft({name: adapters / name for name in names}), base_route())
every = [*names, NO_ADAPTER]
options = CollectOptions(data=data, device="cpu", tokens=int(rest[2]) if stage == "collect" and len(rest) > 2 else 4000)
how = collecting(options, base, model, tokenizer, Recipe(answer_share=0.8, bare_share=0.25))
collector = Collector(tokenizer, how, work, lambda name, folder: find_rows(name, data, folder, tokenizer))
bank = collector.with_frame(bank)
attach(model, bank, top_k=2, init="zeros")
state, layers = model.meteora, dict(meteora_layers(model))
fast = torch.autocast("cpu", torch.bfloat16)


def use(gates: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for path, layer in layers.items():
            layer.gate.copy_(gates[path])


def part(rows: list, before: Callable[[torch.Tensor], object]) -> dict:
    """Sums of the rows, (index, row): the second moments of tasks and of the base route, and the means; every adapter has a weight of 1."""
    counts = torch.tensor([[sum(label == index for label in row.gate_labels) for _, row in rows] for index in range(len(every))]).sum(1)
    table = token_weights([row for _, row in rows], len(every), how.recipe.answer_share) / (counts.sum() / len(every))
    both = {False: InputSums(len(every), table), True: InputSums(len(every), table)}
    for is_base, sums in both.items():
        chosen = sorted((row for index, row in rows if (every[index] == NO_ADAPTER) == is_base), key=len)
        with sums.observing(layers.values(), MeteoraError("out of memory")), fast, torch.no_grad():
            for start in range(0, len(chosen), 8):
                batch = collate(chosen[start : start + 8], how.pad_token)
                labels = batch.gate_labels.reshape(-1)
                keep = labels != IGNORE
                sums.begin(keep, labels[keep], batch.response.reshape(-1)[keep])
                with before(filled_labels(batch.gate_labels)):
                    model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    paths = {id(layer): path for path, layer in layers.items()}
    keys = {path: paths[both[True].of[id(layer)]] for path, layer in layers.items()}
    squares = [{paths[key]: sums.square(key) for key in sums.squares} for sums in both.values()]
    means = {paths[key]: both[False].means[key] + both[True].means[key] for key in both[False].means}
    return {"keys": keys, "tasks": squares[0], "base": squares[1], "means": means, "tokens": int(counts.sum())}


def collect(kind: str, gates: str) -> None:
    began = time.process_time()
    first, second = [], []
    for index, name in enumerate(every):
        rows = collector.train_rows(name, index)
        picked = [row for picks in _planned(row_lengths(rows), how)[0] for row in picks]
        counted = [(index, _counted(rows[row], row, how)) for row in picked]
        first += counted[: len(counted) * 3 // 4]
        second += counted[len(counted) * 3 // 4 :]
    if kind == "routed":
        use(torch.load(work / f"{gates}.gates.pt"))
    generator = torch.Generator().manual_seed(0)
    labels: list[torch.Tensor] = []

    def choose(module: torch.nn.Module, arguments: object) -> None:
        own = torch.rand(len(labels[-1]), 1, generator=generator) < OWN
        state.mode = replace(state.mode, forced=torch.where(own, labels[-1], len(names)))

    def before(wanted: torch.Tensor):
        labels.append(wanted)
        return {"own": lambda: state.force(wanted), "blocks": lambda: state.force(wanted), "bare": state.disabled, "routed": nullcontext}[kind]()

    hooks = [block.register_forward_pre_hook(choose) for block in model.model.layers] if kind == "blocks" else []
    stem = kind if kind != "routed" else f"routed-{gates}"
    for half, rows in (("a", first), ("b", second)):
        torch.save(part(rows, before), work / f"{stem}.{half}.pt")
    for hook in hooks:
        hook.remove()
    print(f"{stem}: {len(first)} and {len(second)} rows, {time.process_time() - began:.0f} CPU s", flush=True)


def measure(name: str, shares: str, more: dict[str, str]) -> None:
    chosen = {kind: float(share) for kind, _, share in (entry.partition("=") for entry in shares.split(","))}
    found = {kind: torch.load(work / f"{kind}.pt", mmap=True) for kind in chosen}
    keys = next(iter(found.values()))["keys"]
    with_base, solved = more.get("base", "1") == "1", {}
    if (work / f"{name}.gates.pt").exists():
        gates = torch.load(work / f"{name}.gates.pt")
    else:
        for key in set(keys.values()):
            total = sum(share * found[kind]["tasks"][key].double() for kind, share in chosen.items())
            means = sum(share * found[kind]["means"][key].double() for kind, share in chosen.items())
            if with_base:
                total += sum(share * found[kind]["base"][key].double() for kind, share in chosen.items())
                solved[key] = ridge_rows(total, means) * 8
            else:
                solved[key] = torch.cat([ridge_rows(total, means[:-1]), means[-1:] * 0]) * 8
        gates = {path: solved[key].float() for path, key in keys.items()}
        torch.save(gates, work / f"{name}.gates.pt")
    use(gates)
    state.temperature = float(more.get("T", 1))
    if not with_base:
        state.mute([NO_ADAPTER])
    with fast:
        measured = measure_gates(model, replace(collector.held_out(every), response_only=True))
    tasks = {task: measured[f"gate_accuracy/{task}"] for task in names}
    losses = [measured[f"lm_loss/{task}"] for task in names]
    print(
        f"{name} T {state.temperature:g} base {int(with_base)} | answers {measured['gate_accuracy']:.4f} tasks {sum(tasks.values()) / len(tasks):.4f}"
        f" all tokens {measured['gate_accuracy_all']:.4f} loss {measured['lm_loss']:.4f} loss of tasks {sum(losses) / len(losses):.4f} |",
        {task: (round(value, 3), round(loss, 3)) for (task, value), loss in zip(tasks.items(), losses, strict=True)},
        flush=True,
    )


if stage == "collect":
    collect(rest[0], rest[1])
else:
    measure(rest[0], rest[1], dict(entry.split("=") for entry in rest[2:]))
