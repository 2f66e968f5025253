"""The same n-grams are banned as by transformers' processor."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from meteora_core.generation.no_repeat import NOTHING, NoRepeat


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("start", [1, 4, 40])
def test_the_same_tokens_are_banned_as_by_transformers(size: int, start: int) -> None:
    generator = torch.Generator().manual_seed(size * 100 + start)
    vocabulary, rows, steps = 3 if size < 30 else 1, 6, 80
    processor = NoRepeatNGramLogitsProcessor(size)
    pads = [0, 1, 3, start - 1, 0, 0]
    text = torch.full((rows, start + steps), NOTHING)
    text[:, :start] = torch.randint(vocabulary, (rows, start), generator=generator)
    for row, pad in enumerate(pads):
        text[row, : min(pad, start - 1)] = NOTHING
    ours, narrow = NoRepeat(text, start, size), NoRepeat(text[:, :start].clone(), start, size)
    banned = 0
    for step in range(steps):
        scores = torch.randn(rows, 5, generator=generator)
        made = ours.ban(scores.clone())
        for row in range(rows):
            ids = ours.text[row, : start + step]
            wanted = processor(ids[ids != NOTHING].unsqueeze(0), scores[row : row + 1].clone())
            assert torch.equal(made[row : row + 1], wanted), (row, step)
        banned += int(made.isinf().sum())
        tokens = torch.randint(vocabulary, (rows,), generator=generator)
        ours.add(tokens, torch.tensor([start + step]))
        again = NoRepeat(ours.text.clone(), start + step + 1, size)
        assert torch.equal(again.ban(scores), ours.ban(scores))
        if narrow.text.shape[1] == start + step:
            narrow.widen(start + step + 7)
        narrow.add(tokens, torch.tensor([start + step]))
        assert torch.equal(narrow.ban(scores), ours.ban(scores))
    assert banned


def test_nothing_is_banned_when_off() -> None:
    scores = torch.zeros(1, 4)
    assert NoRepeat(torch.tensor([[1, 1, 1]]), 3, 0).ban(scores) is scores
