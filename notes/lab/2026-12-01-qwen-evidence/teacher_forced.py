"""Top-1 share of the closed form over inputs of the untrained base, with several ridge strengths: can the tasks be told apart at all?

    python teacher_forced.py BASE DATASETS [--layers 2,5] [--train 14] [--held 5] [--length 80]      # BASE is a local folder

Held-out train rows, answer tokens; the mean over tasks and the share of all tokens. Prompts are cut from the left.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from meteora_core.data.rows import Row, available_tasks, read_rows

ANSWER_SHARE = 0.8
STRENGTHS = ("mean 1e-2", "mean 1e-3", "mean 1e-4", "median 1e-2", "each 1e-2", "each 3e-2", "each 1e-1")
"""Ridge strengths relative to the mean or median of the features' mean squares, or to each by itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", default="2,5")
    parser.add_argument("--train", type=int, default=14)
    parser.add_argument("--held", type=int, default=5)
    parser.add_argument("--length", type=int, default=80)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    decoder = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).model.eval()
    chosen = [int(layer) for layer in arguments.layers.split(",")]
    decoder.layers = decoder.layers[: max(chosen) + 1]
    seen: dict[str, Tensor] = {}
    for number in chosen:
        layer = decoder.layers[number]
        named = {"qkv": layer.self_attn.q_proj, "o": layer.self_attn.o_proj, "gate and up": layer.mlp.gate_proj, "down": layer.mlp.down_proj}
        for name, module in named.items():
            module.register_forward_pre_hook(lambda module, inputs, key=f"{number} {name}": seen.__setitem__(key, inputs[0]))
    tasks = [task for task in available_tasks(arguments.data) if not task.startswith("composite_")]
    random.seed(0)
    inputs: dict[bool, dict[str, list[Tensor]]] = {True: {}, False: {}}
    labels: dict[bool, list[Tensor]] = {True: [], False: []}
    answers = []
    for index, task in enumerate(tasks):
        rows = read_rows(arguments.data, task, "train")
        random.shuffle(rows)
        for train, part in ((True, rows[: arguments.train]), (False, rows[arguments.train :][: arguments.held])):
            ids, mask, answer = padded(part, tokenizer, arguments.length)
            with torch.no_grad():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            kept = mask.bool() if train else answer
            for key, tensor in seen.items():
                inputs[train].setdefault(key, []).append(tensor[kept])
            labels[train].append(torch.full((int(kept.sum()),), index))
            if train:
                answers.append(answer[kept])
    wanted, truth, is_answer = torch.cat(labels[True]), torch.cat(labels[False]), torch.cat(answers)
    weights = torch.zeros(len(wanted), dtype=torch.float64)
    for index in range(len(tasks)):
        for kind, share in ((True, ANSWER_SHARE), (False, 1 - ANSWER_SHARE)):
            place = (wanted == index) & (is_answer == kind)
            weights[place] = share / int(place.sum())
    print(f"{len(wanted)} train tokens, {len(truth)} held-out answer tokens")
    for key in inputs[True]:
        report(key, torch.cat(inputs[True][key]).double(), wanted, weights, torch.cat(inputs[False][key]).double(), truth, len(tasks))


def padded(rows: list[Row], tokenizer: Any, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask, int64 (rows, tokens), and whether each token belongs to an answer, bool."""
    texts = []
    for row in rows:
        answer = tokenizer(row.response + tokenizer.eos_token)["input_ids"][:40]
        texts.append((tokenizer(row.prompt)["input_ids"][-max(16, length - len(answer)) :], answer))
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask, answers = ids.clone(), ids.bool()
    for place, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[place, :end], mask[place, :end], answers[place, len(prompt) : end] = torch.tensor(prompt + answer), 1, True
    return ids, mask, answers


def report(key: str, inputs: Tensor, wanted: Tensor, weights: Tensor, held: Tensor, truth: Tensor, tasks: int) -> None:
    """Solve with every strength, and print the top-1 shares."""
    squares = (inputs * weights[:, None]).t() @ inputs
    means = torch.stack([(inputs[wanted == task] * weights[wanted == task, None]).sum(0) for task in range(tasks)])
    targets, diagonal = means - means.mean(0), squares.diagonal().clone()
    shares = []
    for strength in STRENGTHS:
        kind, factor = strength.split()
        level = {"mean": diagonal.mean().expand_as(diagonal), "median": diagonal.median().expand_as(diagonal), "each": diagonal}[kind]
        gate = torch.linalg.solve(squares + torch.diag(float(factor) * level), targets.t())
        right = ((held @ gate).argmax(1) == truth).double()
        shares.append(f"{strength}: {torch.stack([right[truth == task].mean() for task in range(tasks)]).mean():.3f} / {right.mean():.3f}")
    print(f"{key}: mean / median of the mean squares {diagonal.mean() / diagonal.median():.1f}; {'; '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
