"""The real base model with adapters on all its linear layers: the same answers in any batch, token for token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from meteora_core import AdapterBank, attach
from meteora_core.adapters.peft_folder import Adapter, AdapterInfo, LoraWeights
from meteora_core.generation.batches import BatchLimits, answer_all
from meteora_core.generation.engine import Engine
from meteora_core.generation.prompts import encode_prompts
from meteora_core.model.base import BaseReference, load_base, load_tokenizer

NEW = 6
"""Number of tokens in an answer."""

PROMPTS = [
    "[INST] Is the sky of the Earth blue on a clear day? [/INST]\n",
    "[INST] Repeat after me: one two three one two three one two three one two three [/INST]\n",
    "[INST] Name three fruits and say which one is the sweetest of them. Give a reason, and keep it short, please. [/INST]\n",
    "[INST] 7 + 5 = [/INST]\n",
    "[INST] The following paragraphs each describe a set of three objects arranged in a fixed order. The statements are logically consistent within each "
    "paragraph. On a shelf, there are three books: a red book, a gray book, and a white book. Which one is the leftmost? [/INST]\n",
]


def some_bank(base: PreTrainedModel) -> AdapterBank:
    """Three random adapters on all linear layers of the decoder, large enough to change answers."""
    made = []
    for seed, name in enumerate(("one", "two", "three")):
        generator = torch.Generator().manual_seed(seed)
        linears = [(path, module) for path, module in base.named_modules() if isinstance(module, nn.Linear) and ".layers." in path]
        weights = {
            path: LoraWeights(
                torch.randn(4, module.in_features, generator=generator) * 0.02, torch.randn(module.out_features, 4, generator=generator) * 0.2, 2.0
            )
            for path, module in linears
        }
        made.append(Adapter(AdapterInfo(name=name, source="", sha256="", base="smollm2-135m", rank=4, alpha=8.0, rslora=False, dropout=0.0), weights))
    return AdapterBank.stack(made)


@pytest.mark.slow
def test_batches_of_1_8_and_auto_answer_token_for_token_alike() -> None:
    tokenizer = load_tokenizer(BaseReference("smollm2-135m"))
    prompts = encode_prompts(PROMPTS, tokenizer)
    base = load_base(BaseReference("smollm2-135m"))

    def answers(batch_size, graphs="off") -> dict[int, list[int]]:
        made = answer_all(Engine(base, tokenizer, graphs, no_repeat_ngram_size=6), prompts, BatchLimits(batch_size, NEW))
        return {prompt.index: tokens for prompt, tokens in made}

    bare = answers(8)
    attach(base, some_bank(base), seed=1)
    routed = answers(1)
    assert answers(8) == answers("auto") == routed
    assert routed != bare
    assert answers(8, "on") == routed
