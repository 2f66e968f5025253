"""The README's loop on gates that start at random, measured on test rows.

Before: meteora data build --task logical_deduction,strategyqa --max-train 300 --max-test 40
        meteora ckpt pack meteora_core/starter/checkpoint two --task logical_deduction,strategyqa
"""

import random

import torch

from meteora_core import load_checkpoint, record_routes
from meteora_core.data.rows import read_rows
from meteora_core.model.base import BaseReference, load_tokenizer

NAMES = ("logical_deduction", "strategyqa")


def measure(model, tokenizer):
    """The share of answer tokens and layers whose first choice is the task's own adapter."""
    right = total = 0
    for index, name in enumerate(NAMES):
        for row in read_rows("datasets", name, "test", limit=20):
            start = tokenizer(row.prompt, return_tensors="pt").input_ids.shape[1]
            with torch.no_grad(), record_routes(model) as routes:
                model(**tokenizer(row.prompt + row.response, return_tensors="pt"))
            first = routes.packed(0)[0][start:, :, 0]
            right, total = right + (first == index).sum().item(), total + first.numel()
    return right / total


model, tokenizer = load_checkpoint("two"), load_tokenizer(BaseReference("smollm2-135m"))
generator = torch.Generator().manual_seed(0)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name.endswith(".gate"))
    if name.endswith(".gate"):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
print(0, measure(model, tokenizer))

random.seed(0)
rows = [(index, row) for index, name in enumerate(NAMES) for row in read_rows("datasets", name, "train", limit=200)]
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
for step in range(200):
    index, row = random.choice(rows)
    batch = tokenizer(row.prompt + row.response, return_tensors="pt")
    with model.meteora.label_gates(torch.full_like(batch.input_ids, index)) as gates:
        loss = model(**batch, labels=batch.input_ids).loss + 50 * gates.mean_loss(batch.input_ids.numel())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step + 1 in (50, 100, 200):
        print(step + 1, measure(model, tokenizer))
