"""Gates in closed form for adapters without rows, from several sources of text, measured as they route held-out rows.

python no_rows.py BASE ADAPTERS DATA OUT.json [--sources rows,few,...] [--tokens 3000] [--held 8] [--dtype float32] [--device cpu]

rows: the adapter's train rows, for comparison. self: prompts that the adapter writes from the start of its frame, and neutral questions. neutral: neutral questions
alone. named: prompts that the base writes when told the adapter's name. magpie: prompts that the base writes from the start of a user's turn, the same for all
adapters. exampleN: N prompts of the task without their answers. fewN: these, and prompts that the base writes in their manner. The adapter always answers.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import alone, with_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row
from meteora_core.data.tasks import COMPOSITES
from meteora_core.generation.engine import Engine
from meteora_core.living.checkpoints import BARE_SHARE
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.general import general_rows
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.living.self_written import _texts, self_written_rows
from meteora_core.model.attach import detach, meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.training.encoding import encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.statistics import closed_form_gates
from meteora_core.training.task_rows import HeldOut

parser = argparse.ArgumentParser()
parser.add_argument("base")
for name in ("adapters", "data", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--sources", default="rows,few4,example4,named,self,neutral,magpie,few1")
parser.add_argument("--tokens", type=int, default=3000)
parser.add_argument("--held", type=int, default=8)
parser.add_argument("--count", type=int, default=20, help="prompts that are written for each adapter")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--device", default="cpu")
given = parser.parse_args()
BEGAN = time.time()

base, device = BaseReference(given.base), torch.device(given.device)
tokenizer, model = load_tokenizer(base), load_base(base, dtype=getattr(torch, given.dtype), device=device).eval()
ten = set(COMPOSITES["composite_10"])
names = [path.name for path in sorted(given.adapters.iterdir()) if (path / "adapter_config.json").is_file() and path.name in ten]
every = [*names, NO_ADAPTER]
work = given.out.with_suffix(".statistics")
work.mkdir(parents=True, exist_ok=True)
options = CollectOptions(data=given.data, device=given.device, tokens=given.tokens, max_length=512)
recipe = Recipe(answer_share=options.answer_share, bare_share=BARE_SHARE, frame=INST.text)
how = collecting(options, base, model, tokenizer, recipe)
collector = Collector(tokenizer, how, work, lambda name, folder: find_rows(name, given.data, folder, tokenizer))
bank = collector.with_frame(with_adapter(AdapterBank.from_peft({name: given.adapters / name for name in names}), base_route()))
results: dict = json.loads(given.out.read_text()) if given.out.exists() else {}


def log(*parts: object) -> None:
    print(f"{time.time() - BEGAN:6.1f} {time.process_time():6.1f}", *parts, flush=True)


def around(messages: list[str]) -> list[str]:
    kept = [message.strip() for message in messages]
    return [INST.around(message) for message in kept if len(message) > 3]


def in_a_turn(text: str) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def magpie() -> list[str]:
    """Prompts that the base writes from the start of a user's turn."""
    opening = in_a_turn("|").partition("|")[0]
    written = _texts(Engine(model, tokenizer, "off"), [opening] * given.count, 72, 7)
    return around([text.partition("\n")[0] for text in written])


def named(name: str) -> list[str]:
    what = name.replace("_", " ")
    wording = [f"Write an example of a question for the task “{what}”. Write only the question.", f"Give me an example input for “{what}”."]
    written = _texts(Engine(model, tokenizer, "off"), [in_a_turn(wording[number % 2]) for number in range(given.count)], 96, 7)
    return around(written)


def few(examples: list[str]) -> list[str]:
    """Prompts that the base writes after examples of prompts, each ended by the frame."""
    openings = []
    for number in range(given.count):
        order = examples[number % len(examples) :] + examples[: number % len(examples)]
        openings.append("\n\n".join(text.strip() for text in order) + "\n\n" + INST.before.rstrip(" "))
    written = _texts(Engine(model, tokenizer, "off"), openings, 160, 7)
    return around([text.partition(INST.after.strip())[0] for text in written])


def answered(name: str, prompts: list[str]) -> list[Row]:
    attach(model, alone(bank, name), top_k=1, init="zeros")
    try:
        answers = []
        for start in range(0, len(prompts), 20):
            answers += _texts(Engine(model, tokenizer, "off"), prompts[start : start + 20], 48, 11 + start)
    finally:
        detach(model)
    return [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]


def rows_of(source: str, name: str) -> list[Row]:
    train = collector.rows(name).train
    if source == "rows":
        return train
    if source == "self":
        return self_written_rows(model, tokenizer, alone(bank, name), INST).train
    if source == "neutral":
        return answered(name, [row.prompt for row in general_rows(INST, 42).train if row.prompt][: given.count])
    if source == "named":
        return answered(name, named(name))
    if source == "magpie":
        return answered(name, shared)
    short = [row.prompt for row in train if len(row.prompt) < 1500]
    examples = short[: int(source.removeprefix("few").removeprefix("example"))]
    return answered(name, [*examples, *(few(examples) if source.startswith("few") else [])])


def measure(gates: dict[str, torch.Tensor]) -> dict:
    groups = []
    for index, name in enumerate(every):
        held = [] if name == NO_ADAPTER else [row for row in collector.rows(name).held_out if len(row.prompt) < 1800][: given.held]
        groups.append(list(encode_rows(held, tokenizer, index, 512, INST.end_id(tokenizer)).rows) if held else [])
    attach(model, bank, top_k=2, init="zeros")
    try:
        with torch.no_grad():
            for path, layer in meteora_layers(model):
                layer.gate.copy_(gates[path])
        measured = measure_gates(model, HeldOut(groups, every, how.pad_token, 8, response_only=True))
    finally:
        detach(model)
    accuracy = {name: measured[f"gate_accuracy/{name}"] for name in names}
    losses = {name: measured[f"lm_loss/{name}"] for name in names}
    return {
        "answers": measured["gate_accuracy"],
        "mean over tasks": sum(accuracy.values()) / len(names),
        "all tokens": measured["gate_accuracy_all"],
        "mean loss": sum(losses.values()) / len(names),
        "accuracy": accuracy,
        "losses": losses,
    }


log(len(names), "adapters")
general = collector.collect(model, alone(bank, NO_ADAPTER), collector.rows(NO_ADAPTER), recipe, list(bank.modules))
log("general text")
shared = magpie() if "magpie" in given.sources else []
for source in given.sources.split(","):
    statistics: list[GateStatistics] = []
    written = {}
    for name in names:
        rows = rows_of(source, name)
        if source != "rows":
            written[name] = [[row.prompt, row.response] for row in rows]
        made = collector.collect(model, alone(bank, name), AdapterRows(rows, [], INST, INST.text, Path(source)), recipe, list(bank.modules))
        statistics.append(made)
        log(source, name, made.header.rows, "rows", made.header.tokens, "tokens counted")
        given.out.with_suffix(f".{source}.json").write_text(json.dumps(written, indent=1, ensure_ascii=False))
    gates = dict(closed_form_gates([*statistics, general], list(bank.modules)))
    results[source] = measure(gates)
    log(source, {key: round(value, 4) for key, value in results[source].items() if not isinstance(value, dict)})
    given.out.with_suffix(".part").write_text(json.dumps(results, indent=1))
    os.replace(given.out.with_suffix(".part"), given.out)
    for each in statistics:
        each.file.unlink()
