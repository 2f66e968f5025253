"""Measures a routed checkpoint, or the adapters of a folder: held-out routing, general text, and scores of all tasks in the same batches.

python measure.py DATA RESULTS NAME --checkpoint FOLDER|--adapters FOLDER [--do routing,text,scores] [--configs meteora,own,base] [--rows 64] [--general FILE]

RESULTS gets NAME.routing.json, NAME.text.json, and NAME.CONFIG.TASK.json for the scores, each as it ends; files that exist are not made again.
configs: meteora: the gates choose; own: the task's own adapter; base: no adapter. Prompts of all tasks and configs share batches, whose rows are routed by
their own options. general.jsonl is of texts.py (2026-11-30-cheaper-statistics). `measure.py DATA RESULTS report` prints the figures.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach, load_checkpoint
from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row
from meteora_core.data.tasks import get_task
from meteora_core.evaluation.clean import clean_response
from meteora_core.evaluation.runner import headline, test_rows
from meteora_core.evaluation.scoring import evaluate_responses
from meteora_core.generation.engine import Engine
from meteora_core.generation.prompts import encode_prompts
from meteora_core.generation.requests import Request, RoutingScope
from meteora_core.generation.sampling import Sampling
from meteora_core.living.rows import find_rows
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.model.vocabulary import padding_token
from meteora_core.routing import RoutingOptions
from meteora_core.routing.routes import Routes
from meteora_core.training.encoding import collate, encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.task_rows import HeldOut

parser = argparse.ArgumentParser()
parser.add_argument("data", type=Path)
parser.add_argument("results", type=Path)
parser.add_argument("name")
parser.add_argument("--base")
parser.add_argument("--checkpoint", type=Path)
parser.add_argument("--adapters", type=Path)
parser.add_argument("--do", default="routing,text,scores")
parser.add_argument("--configs", default="meteora")
parser.add_argument("--general", type=Path)
parser.add_argument("--rows", type=int, default=64)
parser.add_argument("--held", type=int, default=64)
parser.add_argument("--tasks", default="")
parser.add_argument("--budget", type=int, default=100_000, help="tokens of a batch, answers included")
parser.add_argument("--max-new-tokens", type=int, default=10_000)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="auto")
parser.add_argument("--deadline", type=float, default=1e12, help="time since the epoch after which no batch is started")
given = parser.parse_args()
given.results.mkdir(parents=True, exist_ok=True)
BEGAN = time.time()


def log(*parts: object) -> None:
    print(time.strftime("%H:%M:%S"), f"{time.time() - BEGAN:6.1f} [{given.name}]", *parts, flush=True)


def late() -> bool:
    return time.time() > given.deadline


def target(what: str) -> Path:
    return given.results / f"{given.name}.{what}.json"


def write(file: Path, value: object) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, file)


class World:
    """The model with its adapters."""

    def __init__(self) -> None:
        self.base = BaseReference(given.base)
        self.tokenizer = load_tokenizer(self.base)
        if given.checkpoint:
            self.model = load_checkpoint(given.checkpoint, self.base, given.dtype, given.device).eval()
        else:
            folders = {path.name: path for path in sorted(given.adapters.iterdir()) if (path / "adapter_config.json").is_file()}
            dtype = ("bfloat16" if given.device.startswith("cuda") else "float32") if given.dtype == "auto" else given.dtype
            self.model = load_base(self.base, dtype=getattr(torch, dtype), device=torch.device(given.device)).eval()
            attach(self.model, AdapterBank.from_peft(folders), top_k=2, init="zeros")
        self.state, self.pad = self.model.meteora, padding_token(self.model, self.tokenizer)
        self.names = list(self.state.names)
        self.adapters = [name for name in self.names if name != NO_ADAPTER]
        self.tasks = given.tasks.split(",") if given.tasks else self.adapters
        self.device = next(self.model.parameters()).device

    def held_out(self, name: str, most: int, length: int) -> list:
        rows = find_rows(name, given.data, None, self.tokenizer)
        return list(encode_rows(rows.held_out[:most], self.tokenizer, self.names.index(name), length, rows.frame.end_id(self.tokenizer)).rows)


def routing(world: World) -> None:
    """The share of held-out tokens whose first choice is their own adapter."""
    groups = [[] if name == NO_ADAPTER else world.held_out(name, given.held, 512) for name in world.names]
    measured = measure_gates(world.model, HeldOut(groups, world.names, world.pad, 16, response_only=True))
    by_task = {name: measured[f"gate_accuracy/{name}"] for name in world.adapters}
    losses = [measured[f"lm_loss/{name}"] for name in world.adapters]
    found = {
        "answers": measured["gate_accuracy"],
        "mean over tasks": sum(by_task.values()) / len(by_task),
        "all tokens and layers": measured["gate_accuracy_all"],
    }
    found |= {"loss": measured["lm_loss"], "mean loss": sum(losses) / len(losses), "rows": sum(map(len, groups)), "tasks": by_task, "details": measured}
    write(target("routing"), found)
    log("routing", {key: round(value, 4) for key, value in found.items() if isinstance(value, float)})


@torch.no_grad()
def text(world: World) -> None:
    """Cross-entropy of general text on the base model and as routed, and the mean weight of the base route in each row, also of the tasks' held-out rows."""
    sets: dict[str, list] = defaultdict(list)
    for line in given.general.read_text().splitlines():
        item = json.loads(line)
        sets[item["kind"]].append(Row("", item["text"]) if "text" in item else Row(INST.around(item["question"]), item["answer"]))
    encoded = {kind: list(encode_rows(rows, world.tokenizer, 0, 384, None).rows) for kind, rows in sets.items()}
    has_base = NO_ADAPTER in world.names
    for name in world.adapters if has_base else []:
        encoded[f"task {name}"] = world.held_out(name, 24, 384)
    found: dict = {}
    for kind, rows in encoded.items():
        ordered, sums, shares = sorted(rows, key=len), torch.zeros(2, 2, 2, dtype=torch.float64), []
        for start in range(0, len(ordered), 16):
            batch = collate(ordered[start : start + 16], world.pad).to(world.device)
            keep = batch.gate_labels >= 0
            for which in range(2) if not kind.startswith("task") else (1,):
                routes = Routes(world.state.names)
                with world.state.disabled() if which == 0 else world.state.record(routes):
                    logits = world.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
                if which and has_base:
                    chosen = [routes.steps(path)[0] for path in routes.paths]
                    share = sum(((each.indices == world.names.index(NO_ADAPTER)) * each.weights).sum(-1) for each in chosen) / len(chosen)
                    shares += ((share * keep).sum(1) / keep.sum(1)).tolist()
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
                for part, where in enumerate((keep[:, 1:], keep[:, 1:] & batch.response[:, 1:])):
                    sums[which, part] += torch.tensor([(loss * where).sum().item(), where.sum().item()], dtype=torch.float64)
        means = sums[..., 0] / sums[..., 1]
        found[kind] = {"rows": len(rows), "tokens": sums[1, 0, 1].item(), "base": means[0].tolist(), "routed": means[1].tolist(), "base_share": shares}
    write(target("text"), found)
    log("text", *text_lines(found))


def text_lines(found: dict) -> list[str]:
    """Perplexities over the base's, and how well the base route's weight separates general text from the tasks' rows."""
    lines = []
    tasks = torch.tensor([share for kind, each in found.items() if kind.startswith("task") for share in each["base_share"]])
    for kind, each in found.items():
        if not kind.startswith("task"):
            ratios = [math.exp(after - before) for before, after in zip(each["base"], each["routed"], strict=True)]
            lines.append(f"{kind}: perplexity over the base's, all tokens {ratios[0]:.4f}, answers {ratios[1]:.4f} ({each['rows']} rows)")
            if each["base_share"]:
                rows = torch.tensor(each["base_share"])
                auroc = ((rows[:, None] > tasks).float() + 0.5 * (rows[:, None] == tasks).float()).mean()
                lines.append(f"{kind}: AUROC {auroc:.4f}, mean weight {rows.mean():.3f}, of tasks {tasks.mean():.3f} ({len(tasks)} rows)")
    return lines


def scores(world: World) -> None:
    """Generate the answers of all tasks and configs, those of similar length together, and score each task as soon as all its answers are there."""
    options = {
        "base": lambda name: RoutingOptions(enabled=False),
        "own": lambda name: RoutingOptions(forced=name),
        "meteora": lambda name: RoutingOptions(top_k=2, temperature=1.0),
    }
    rows, answers, items = {}, defaultdict(dict), []
    for name in world.tasks:
        task = get_task(name)
        rows[name] = test_rows(given.data, task, given.rows)
        most = min(task.max_new_tokens, given.max_new_tokens)
        for prompt in encode_prompts([row.prompt for row in rows[name]], world.tokenizer):
            for config in given.configs.split(","):
                if not target(f"{config}.{name}").exists():
                    scope = RoutingScope.of(world.state, options[config](name))
                    items.append((config, name, prompt.index, Request(prompt.tokens, Sampling(most), scope)))
    # Answers are short, medium or long; within each kind, prompts of similar length share a batch.
    items.sort(key=lambda item: (sum(item[3].sampling.max_new_tokens > limit for limit in (64, 256)), len(item[3].ids)))
    engine = Engine(world.model, world.tokenizer)
    place = 0
    while place < len(items) and not late():
        longest, count = 0, 0
        kind = sum(items[place][3].sampling.max_new_tokens > limit for limit in (64, 256))
        for item in items[place:]:
            most = item[3].sampling.max_new_tokens
            longest = max(longest, len(item[3].ids) + (64, 256, 768)[kind])
            if sum(most > limit for limit in (64, 256)) != kind or (count and longest * (count + 1) > given.budget):
                break
            count += 1
        began = time.time()
        batch = items[place : place + count]
        try:
            made = engine.answer([item[3] for item in batch])
        except torch.OutOfMemoryError:
            given.budget //= 2
            engine.release()
            torch.cuda.empty_cache()
            log("out of memory, batches of", given.budget)
            if given.budget < 2000:
                raise
            continue
        place += count
        for (config, name, index, _), ids in zip(batch, made, strict=True):
            answers[config, name][index] = ids
        log(f"{place} of {len(items)} answers, {count} rows of up to {longest} tokens, {time.time() - began:.1f} s")
        for (config, name), each in list(answers.items()):
            if len(each) == len(rows[name]):
                score(world, config, name, rows[name], [each[index] for index in range(len(each))])
                del answers[config, name]


def score(world: World, config: str, name: str, rows: list[Row], answers: list[list[int]]) -> None:
    task = get_task(name)
    texts = [world.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    cleaned = [clean_response(name, row.prompt + text, row.prompt, "corrected") for row, text in zip(rows, texts, strict=True)]
    found = evaluate_responses(task, cleaned, [row.response for row in rows], "corrected")
    metric, value = headline(found.metrics)
    scale = 100 if metric == "bleu" else 1
    error, each = found.stderr.get(metric), [row.get(metric) if isinstance(row, dict) else getattr(row, metric, None) for row in found.rows]
    kept = {"metric": metric, "score": value / scale, "stderr": None if error is None else error / scale, "rows": len(rows), "each": each}
    write(target(f"{config}.{name}"), kept | {"tokens": sum(map(len, answers)), "answers": cleaned})
    log(config, name, metric, f"{value / scale:.4f}, {sum(map(len, answers))} tokens")


def report() -> None:
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for file in sorted(given.results.glob("*.json")):
        name, *rest = file.stem.split(".")
        value = json.loads(file.read_text())
        if rest == ["routing"]:
            print(f"{name}: held-out routing", {key: round(each, 4) for key, each in value.items() if isinstance(each, int | float)})
            print("   by task", {task: round(each, 3) for task, each in sorted(value["tasks"].items(), key=lambda item: item[1])})
        elif rest == ["text"]:
            print("\n".join(f"{name}: {line}" for line in text_lines(value)))
        elif len(rest) == 2:
            found[f"{name}.{rest[0]}"][rest[1]] = value
        else:
            print(file.stem, json.dumps(value)[:2000])
    for config, tasks in found.items():
        error = math.sqrt(sum((each["stderr"] or 0) ** 2 for each in tasks.values())) / len(tasks)
        print(
            f"{config}: {sum(each['score'] for each in tasks.values()) / len(tasks):.4f} ± {error:.4f}, {len(tasks)} tasks, rows {sorted({each['rows'] for each in tasks.values()})}"
        )
    pairs = [(config, other) for config in found for other in found if config != other and other.rpartition(".")[2] in ("own", "base")]
    pairs += [
        (one, other)
        for one, other in (("routed.meteora", "plain.meteora"), ("again.meteora", "closed.meteora"), ("added.meteora", "routed.meteora"))
        if one in found and other in found
    ]
    pairs += [(config, "ten.meteora") for config in found if "ten.meteora" in found and config.split(".")[0] in ("examples", "named", "written")]
    for one, other in pairs:
        if both := sorted(set(found[one]) & set(found[other])):
            first, second = (sum(found[config][name]["score"] for name in both) / len(both) for config in (one, other))
            spread = 0.0
            for name in both:
                values = [found[config][name]["each"] for config in (one, other)]
                if None not in values[0] and len(values[0]) == len(values[1]):
                    change = torch.tensor([float(a) - float(b) for a, b in zip(*values, strict=True)], dtype=torch.float64)
                    spread += (change.var() / len(change)).item()
                else:
                    spread += sum((found[config][name]["stderr"] or 0) ** 2 for config in (one, other))
            error = math.sqrt(spread) / len(both)
            print(
                f"{one} / {other}: {first:.4f} / {second:.4f} = {first / max(second, 1e-9):.4f} ± {error / max(second, 1e-9):.4f}; difference {first - second:.4f} ± {error:.4f} (paired rows), {len(both)} tasks"
            )
    names = sorted({name for tasks in found.values() for name in tasks})
    if names:
        print("\n| task |", " | ".join(found), "|")
        for name in names:
            print(f"| {name} |", " | ".join(f"{tasks[name]['score']:.3f}" if name in tasks else "–" for tasks in found.values()), "|")


if __name__ == "__main__":
    if given.name == "report":
        report()
    else:
        world = World()
        log("loaded", len(world.names), "adapters on", world.device)
        for part in given.do.split(","):
            if part == "scores" or (not target(part).exists() and not late()):
                {"routing": routing, "text": text, "scores": scores}[part](world)
        log("ended")
