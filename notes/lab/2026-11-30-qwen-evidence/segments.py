"""Composites by forced routes and forced form: which part of a composite answer goes wrong?

    python segments.py CHECKPOINT --data DATASETS --adapters ADAPTERS --base BASE --out FILE [--rows 64] [--composites 3,5]

Every way of answering is greedy, on the same rows:

alone         each question of a composite by itself, by its task's adapter
oracle        the composite; every token of the prompt and of the answer is routed to the adapter of its part, and the model writes the numbers
oracle-given  the same, but the numbers are given: "1." at the start, and the next number where the model ends its answer
gates-given   the numbers are given, and the gates choose
base-given    the numbers are given, without adapters

The ways "gates" and "base" without given numbers are ``meteora eval`` of the checkpoint and of the base.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meteora_core.checkpoints.opening import attach_checkpoint, describe_checkpoint
from meteora_core.data.composite import CompositeRequest, plan_composite
from meteora_core.data.manifest import read_manifest
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import get_task
from meteora_core.evaluation.clean import clean_response
from meteora_core.evaluation.scoring import evaluate_responses
from meteora_core.json_files import read_json, write_json
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.routing import meteora_of
from meteora_core.training.composites import composite_text

WAYS = ("alone", "oracle", "oracle-given", "gates-given", "base-given")


@dataclass
class Writing:
    """An answer that is being written.

    Attributes:
        ids, labels: Tokens of the prompt, and the adapter of each.
        adapters: The adapter of each part of the answer.
        limits: The most tokens of each part.
        given: Whether the numbers are given.
        answer: New tokens.
        part, used: The part that is being written, and its number of tokens so far.
        queue: Tokens that are written next, whatever the model says.
        ends: How the parts ended.
    """

    ids: list[int]
    labels: list[int]
    adapters: list[int]
    limits: list[int]
    given: bool
    answer: list[int] = field(default_factory=list)
    part: int = 0
    used: int = 0
    queue: list[int] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    done: bool = False


def labelled_parts(data: Path, name: str, count: int) -> tuple[list[list[Row]], list[list[Row]]]:
    """The solved examples of a composite, and the members' rows of its first test rows."""
    manifest = read_manifest(data / name)
    assert manifest is not None
    members = manifest.members
    plan = plan_composite(data, CompositeRequest(n=len(members), examples=len(manifest.examples)))
    train = [read_rows(data, member, "train") for member in members]
    solved = [[train[place][number] for place, number in enumerate(example)] for example in plan.solved.numbers]
    stored = read_rows(data, name, "test", count)
    return solved, [[plan.test[place][plan.order[place][number]] for place in range(len(members))] for number in range(len(stored))]


def labelled_prompts(data: Path, name: str, names: Sequence[str], tokenizer: Any, count: int) -> tuple[list[tuple[list[int], list[int]]], list[Row], list[list[Row]]]:
    """Tokens and adapters of every prompt, the composite rows, and the members' rows of each."""
    solved, parts = labelled_parts(data, name, count)
    stored = read_rows(data, name, "test", count)
    index = [names.index(member) for member in get_task(name).members]
    prompts = []
    for row, rows in zip(stored, parts, strict=True):
        text = composite_text(list(zip(index, rows, strict=True)), solved)
        assert text.prompt == row.prompt, "the rows are not those of the plan"
        encoding = tokenizer(text.prompt, return_offsets_mapping=True)
        labels, current, last = [], 0, index[0]
        for begin, end in encoding["offset_mapping"]:
            while current < len(text.spans) and text.spans[current][1] <= begin:
                current += 1
            if end > begin and current < len(text.spans) and text.spans[current][0] <= begin:
                last = text.spans[current][2]
            labels.append(last)
        prompts.append((list(encoding["input_ids"]), labels))
    return prompts, stored, parts


@torch.inference_mode()
def write(model: Any, tokenizer: Any, writings: Sequence[Writing], way: str, batch: int) -> None:
    """Write all answers, in batches of prompts of similar length."""
    ordered = sorted(writings, key=lambda each: -len(each.ids))
    for start in range(0, len(ordered), batch):
        _write_batch(model, tokenizer, ordered[start : start + batch], way)


def _write_batch(model: Any, tokenizer: Any, rows: Sequence[Writing], way: str) -> None:
    state, device, pad = meteora_of(model), model.device, tokenizer.pad_token_id
    ends = {tokenizer.eos_token_id, *([model.generation_config.eos_token_id] if isinstance(model.generation_config.eos_token_id, int) else model.generation_config.eos_token_id or [])}
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows], device=device)
    labels = torch.tensor([[row.labels[0]] * (width - len(row.ids)) + row.labels for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, last = None, torch.tensor([-1], device=device)  # an index: a count would copy the output layer for every row
    for row in rows:
        row.queue = tokenizer("1.", add_special_tokens=False)["input_ids"] if row.given else []
    while not all(row.done for row in rows):
        context = state.disabled() if way == "base-given" else state.force(None if way == "gates-given" else labels)
        with context:
            done = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last)
        cache = done.past_key_values
        best = done.logits[:, -1].argmax(-1).tolist()
        chosen = [_next(row, token, ends, tokenizer) for row, token in zip(rows, best, strict=True)]
        ids = torch.tensor([[pad if token is None else token] for token in chosen], device=device)
        labels = torch.tensor([[row.adapters[min(row.part, len(row.adapters) - 1)]] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        positions = positions[:, -1:] + 1


def _next(row: Writing, token: int, ends: set[int], tokenizer: Any) -> int | None:
    """The token that is written, and what follows from it."""
    if row.done:
        return None
    last = row.part == len(row.adapters) - 1
    if row.queue:
        token = row.queue.pop(0)
    elif token in ends or row.used >= row.limits[row.part]:
        row.ends["end token" if token in ends else "too long"] += 1
        if last or not row.given:
            row.done = True
            return None
        row.part, row.used = row.part + 1, 0
        row.queue = tokenizer(f"\n{row.part + 1}.", add_special_tokens=False)["input_ids"]
        token = row.queue.pop(0)
    row.answer.append(token)
    row.used += 1
    if not last and not row.queue and re.search(rf"(?:^|\n)[ \t]*{row.part + 2}\.\s?$", tokenizer.decode(row.answer[-8:])):
        row.ends["next number"] += 1
        row.part, row.used = row.part + 1, 0
    return token


def answer(model: Any, tokenizer: Any, name: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the rows of a composite in one way, and score them."""
    state, task = meteora_of(model), get_task(name)
    names = state.names
    prompts, stored, parts = labelled_prompts(arguments.data, name, names, tokenizer, arguments.rows)
    members = [get_task(member) for member in task.members]
    index = [names.index(member.name) for member in members]
    before, state.temperature = state.temperature, arguments.temperature or task.routing_temperature
    began = time.monotonic()
    try:
        if way == "alone":
            writings = [
                Writing(ids := list(tokenizer(row.prompt)["input_ids"]), [place] * len(ids), [place], [min(arguments.most, member.max_new_tokens)], False)
                for rows in parts
                for row, place, member in zip(rows, index, members, strict=True)
            ]
        else:
            limits = [min(arguments.most, member.max_new_tokens + 8) for member in members]
            writings = [Writing(ids, labels, index, limits, way.endswith("given")) for ids, labels in prompts]
        write(model, tokenizer, writings, way, arguments.batch)
    finally:
        state.temperature = before
    texts = [tokenizer.decode(each.answer, skip_special_tokens=True) for each in writings]
    if way == "alone":
        size = len(members)
        cleaned = [clean_response(members[place % size].name, parts[place // size][place % size].prompt + text, parts[place // size][place % size].prompt) for place, text in enumerate(texts)]
        scores = {
            f"{member.name}/{key}": value
            for place, member in enumerate(members)
            for key, value in evaluate_responses(member, cleaned[place::size], [rows[place].response for rows in parts]).metrics.items()
        }
        scores["correct"] = sum(value for key, value in scores.items() if key.endswith("/accuracy"))
    else:
        cleaned = [clean_response(name, row.prompt + text, row.prompt) for row, text in zip(stored, texts, strict=True)]
        done = evaluate_responses(task, cleaned, [row.response for row in stored])
        scores = {**done.metrics, "attempted_stderr": done.stderr["attempted"], "correct_stderr": done.stderr["correct"]}
    ends: Counter[str] = sum((each.ends for each in writings), Counter())
    return {"composite": name, "way": way, "rows": len(stored), "scores": scores, "ends": dict(ends), "seconds": round(time.monotonic() - began, 1), "answers": texts[:24]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--composites", default="3,5")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--most", type=int, default=4096, help="the most tokens of a part, to try the script out")
    arguments = parser.parse_args()
    device = pick_device(None)
    reference = BaseReference(arguments.base)
    model = load_base(reference, dtype=pick_dtype(None, device), device=device)
    tokenizer = load_tokenizer(reference)
    attach_checkpoint(model, describe_checkpoint(arguments.checkpoint), adapters_dir=arguments.adapters)
    model.eval()
    made = read_json(arguments.out)["made"] if arguments.out.is_file() else []
    for count in arguments.composites.split(","):
        for way in arguments.ways.split(","):
            name = f"composite_{count}"
            if any(each["composite"] == name and each["way"] == way for each in made):
                continue
            made.append(answer(model, tokenizer, name, way, arguments))
            write_json(arguments.out, {"checkpoint": str(arguments.checkpoint), "made": made})
            scores = made[-1]["scores"]
            print(name, way, {key: round(value, 3) for key, value in scores.items() if key in ("attempted", "correct") or key.endswith("accuracy")}, made[-1]["ends"], made[-1]["seconds"], flush=True)


if __name__ == "__main__":
    main()
