"""Prompts and engines for the tests of generation, and transformers' own answers to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling
from support.chat_world import byte_tokenizer

LENGTHS = (5, 17, 9, 1, 30, 12, 8)
"""Lengths of some prompts."""
ROOM = (20, 3, 20, 33, 1, 20, 20)
"""Most new tokens of their answers."""


def requests_of(lengths: Sequence[int] = LENGTHS, room: Sequence[int] = ROOM, seed: int = 1) -> list[Request]:
    """Greedy requests for random prompts, of tokens below 64."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, Sampling(max_new_tokens=most)) for prompt, most in zip(prompts, room, strict=True)]


def engine_of(model: Any, cuda_graphs: Any = "off", no_repeat: int = 0) -> Engine:
    """An engine whose tokenizer ends an answer with token 2."""
    return Engine(model, byte_tokenizer(), cuda_graphs, no_repeat_ngram_size=no_repeat)


def by_transformers(model: Any, requests: Sequence[Request], no_repeat: int = 0, ends: Sequence[int] = (2,)) -> list[list[int]]:
    """Greedy answers by transformers' ``generate``, each prompt by itself."""
    answers = []
    for request in requests:
        ids = torch.tensor([list(request.ids)], device=next(model.parameters()).device)
        config = GenerationConfig(
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=2,
            no_repeat_ngram_size=no_repeat,
            bos_token_id=1,
        )
        row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :].tolist()
        answers.append(row[:-1] if row[-1] in ends else row)
    return answers
